"""Multiple choice by likelihood: scores as a hand would compute them, and a model that learns, resumes and merges."""

import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from glora_llm.cli import main
from glora_llm.data.option_batch import collate_options
from glora_llm.data.store import Row
from glora_llm.evaluation.scoring import score_rows
from glora_llm.tasks.task import COLUMNS
from glora_llm.training.option_objective import OptionObjective
from tests.in_process import alone, one_thread, train_in_process

__all__ = ["alone", "one_thread"]
LENGTHS = [[4, 7, 2], [3, 3], [9, 2, 5, 1], [1, 6, 2], [5, 5], [2, 8, 3]]  # characters of options
ANIMALS = ["fox", "dog", "cat", "owl", "cow", "hen"]
TOOLS = ["saw", "axe", "awl", "pin", "cup", "jar"]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Random prompts of some tokens, options of one to three tokens, the end token after each."""
    generator = np.random.default_rng(1)
    made = []
    for number, lengths in enumerate(LENGTHS):
        prompt = generator.integers(2, 12, 3 + number)
        options = [[*generator.integers(2, 12, 1 + length % 3), 1] for length in lengths]
        parts = [np.array([*prompt, *option], dtype=np.int32) for option in options]
        starts = np.cumsum([0, *(len(part) for part in parts[:-1])]).tolist()
        targets = np.concatenate([np.arange(len(part)) >= len(prompt) for part in parts])
        made.append(Row(np.concatenate(parts), targets, starts, number % len(lengths), tuple(lengths)))
    return made


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, vocab_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def by_hand(model: Any, row: Row) -> list[float]:
    """Loss and tokens of the right option with its end, and whether it is the most likely one: by sum, a character."""
    bounds = [*row.starts, len(row.tokens)]
    losses = []
    for start, stop in pairwise(bounds):
        ids, targets = torch.tensor(row.tokens[start:stop])[None].long(), torch.tensor(row.targets[start:stop])
        with torch.no_grad():
            log_p = model(ids).logits[0].log_softmax(-1)
        each = -log_p[:-1].gather(-1, ids[0, 1:, None])[:, 0]
        losses.append(each[targets[1:]])
    sums = [-float(each[:-1].sum()) for each in losses]  # without the end token, as lm-eval
    by_length = [value / length for value, length in zip(sums, row.option_lengths, strict=True)]
    right = losses[row.right]
    return [
        float(right.sum()), len(right), float(np.argmax(sums) == row.right), float(np.argmax(by_length) == row.right)
    ]  # fmt: skip


def table_of(objective: Any, rows: list[Row], batch: int, rank: int = 0, world: int = 1) -> Tensor:
    def score(made: dict[str, Any]) -> Any:
        with torch.no_grad():
            return objective(**made, score=True)

    lengths = [len(row.tokens) for row in rows]
    return score_rows(
        lengths, lambda chosen: collate_options([rows[n] for n in chosen], 0), score, lambda table: table, batch,
        rank, world,
    )  # fmt: skip


def test_scores_are_those_of_a_hand(rows: list[Row], model: Any) -> None:
    table = table_of(OptionObjective(model), rows, 2)
    expected = torch.tensor([by_hand(model, row) for row in rows], dtype=torch.float64)
    by_length = (table[:, COLUMNS.index("predicted")] == table[:, COLUMNS.index("reference")]).double()
    torch.testing.assert_close(torch.cat([table[:, [0, 1, 4]], by_length[:, None]], 1), expected, atol=1e-5, rtol=1e-5)
    assert 0 < expected[:, 2].sum() < len(rows) and expected[:, 2].tolist() != expected[:, 3].tolist()


def test_batches_and_processes_change_nothing(rows: list[Row], model: Any) -> None:
    objective = OptionObjective(model)
    whole = table_of(objective, rows, 6)
    for batch in (1, 4):
        torch.testing.assert_close(table_of(objective, rows, batch), whole)
    parts = [table_of(objective, rows, 2, rank, 4) for rank in range(4)]  # the last process has no batch of its own
    torch.testing.assert_close(torch.stack(parts).sum(0), whole)


def test_the_loss_is_of_right_options_alone(rows: list[Row], model: Any) -> None:
    objective, batch = OptionObjective(model), collate_options(rows, 0)
    expected = [by_hand(model, row) for row in rows]
    assert objective(**batch).item() == pytest.approx(sum(loss for loss, *_ in expected), rel=1e-5)
    assert objective.targets(batch) == sum(count for _, count, *_ in expected)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """A run on questions of which the right option is always the tool, and the overrides that it was started with."""
    folder, generator = tmp_path_factory.mktemp("choice"), np.random.default_rng(0)
    lines = []
    for number in range(240):
        right, options = number % 3, [str(word) for word in generator.choice(ANIMALS, 3, replace=False)]
        options[right] = TOOLS[int(generator.integers(len(TOOLS)))]
        lines.append(json.dumps({"question": f"which is made, {number}", "options": options, "answer": "ABC"[right]}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    words = [
        "data.format=multiple_choice", f"data.source={folder / 'rows.jsonl'}", "data.prompt=null", "data.max_rows=null",
        "data.validation=40", "data.test=60", "data.max_test_rows=null", "evaluation.test_before=true",
        "evaluation.every=8", "evaluation.max_rows=20", "training.warmup=0", "output.save_every=4",
        "merge.after_training=true", f"output.dir={folder / 'run'}",
    ]  # fmt: skip
    assert train_in_process("tiny_cpu", *words, "training.steps=16") == 0
    yield folder / "run", words


def scores(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"^(test/\w+) +([\d.]+)$", text, re.MULTILINE)}


def test_a_model_learns_and_merges(run: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = run
    summary = json.loads((folder / "summary.json").read_text())
    before, after = summary["test_before"], summary["test"]
    assert before["test/accuracy"] < 0.6, "three options: chance is a third"
    assert after["test/accuracy"] > 0.9, (before, after)
    assert after["test/accuracy_norm"] > 0.8
    assert after["test/loss"] < before["test/loss"]
    assert "validation/accuracy" in summary["validation"]
    capsys.readouterr()
    assert main(["evaluate", str(folder)]) == 0
    adapted = scores(capsys.readouterr().out)
    assert main(["evaluate", str(folder), "--merged", str(folder / "merged")]) == 0
    merged = scores(capsys.readouterr().out)
    assert adapted["test/accuracy"] == pytest.approx(after["test/accuracy"], abs=5e-5)
    assert merged["test/accuracy"] == adapted["test/accuracy"]
    assert merged["test/loss"] == pytest.approx(adapted["test/loss"], abs=2e-4)


def test_a_run_goes_on(run: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    folder, words = run
    before = json.loads((folder / "summary.json").read_text())["test"]
    for lost in ("checkpoints/step-16", "adapter", "merged"):
        shutil.rmtree(folder / lost)
    (folder / "summary.json").unlink()
    assert train_in_process("tiny_cpu", *words, "training.steps=16") == 0
    assert "resumed after step 12 of 16" in capsys.readouterr().out
    after = json.loads((folder / "summary.json").read_text())["test"]
    assert after == pytest.approx(before, rel=1e-6)
