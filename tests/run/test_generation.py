"""Generated answers: scored in training and in `evaluate`, kept before and after, the same in any batch."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from glora_llm import recipe as recipes
from glora_llm.cli import main
from glora_llm.evaluation.generation import Answer, answer_splits
from glora_llm.evaluation.trained import load_adapted
from glora_llm.plan.plan import Plan, make_plan
from glora_llm.run.generation import SAMPLES
from tests.in_process import alone, one_thread, train_in_process

__all__ = ["alone", "one_thread"]
PAIRS = [("two", 2), ("six", 6), ("ten", 10), ("nine", 9)]


def write_pairs(folder: Path) -> list[str]:
    """Write prompts of several lengths, whose answer is a number that the prompt names; return the overrides."""
    lines = []
    for number in range(160):
        word, value = PAIRS[number % len(PAIRS)]
        prompt = f"Q{'?' * (number // 4 % 5)} {word} {word} =>"
        lines.append(json.dumps({"prompt": prompt, "completion": f" it is {word}\n#### {value}"}))
    (folder / "train.jsonl").write_text("\n".join(lines[:120]))
    (folder / "test.jsonl").write_text("\n".join(lines[120:143]))
    return [
        "data.format=prompt_completion", f"data.source={folder / 'train.jsonl'}", f"data.test={folder / 'test.jsonl'}",
        "data.prompt=null", "data.validation=null", "data.max_rows=null", "data.max_test_rows=null",
        "evaluation.generate={max_new_tokens: 24, batch: 4, samples: 23}", "evaluation.test_before=true",
        "training.warmup=0", "training.lr=2e-2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """A run that learns which number a prompt names, merged, and the overrides that it was started with."""
    folder = tmp_path_factory.mktemp("generation")
    words = [
        *write_pairs(folder), "evaluation.generate.samples=3", "training.steps=40", "merge.after_training=true",
        f"output.dir={folder / 'run'}",
    ]  # fmt: skip
    assert train_in_process("tiny_cpu", *words) == 0
    yield folder / "run", words


def test_a_run_scores_and_keeps_its_answers(run: tuple[Path, list[str]]) -> None:
    folder, _ = run
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test_before"]["test/number_match"] < 0.5, "four numbers: chance is a quarter"
    assert summary["test"]["test/number_match"] > 0.8, summary["test"]
    assert summary["test_merged"]["test/number_match"] == summary["test"]["test/number_match"]
    entries = [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()]
    assert len(entries) == 3
    for entry in entries:
        assert entry["prompt"].endswith("=>") and entry["reference"].startswith("it is ")
        assert entry["before"] != entry["after"]
    assert any(entry["after"] == entry["reference"] for entry in entries)


def test_evaluate_gives_the_same_score_unmerged_and_merged(
    run: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    trained = json.loads((folder / "summary.json").read_text())["test"]["test/number_match"]
    for more in ([], ["--merged", str(folder / "merged")]):
        assert main(["evaluate", str(folder), *more]) == 0
        said = re.search(r"^test/number_match +([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
        assert said and float(said[1]) == pytest.approx(trained, abs=5e-5)


@pytest.fixture(scope="module")
def loaded(run: tuple[Path, list[str]]) -> tuple[Plan, Any]:
    folder, words = run
    plan = make_plan(recipes.load("tiny_cpu", words))
    return plan, load_adapted(plan, folder / "adapter")


def texts(loaded: tuple[Plan, Any], processes: int = 1, is_divided: bool = False, **keys: Any) -> list[Answer]:
    """Return all answers, of as many processes as there are said to be."""
    plan, model = loaded
    section = plan.recipe.evaluation.generate
    assert section is not None
    evaluation = plan.recipe.evaluation.model_copy(
        update={"generate": section.model_copy(update={"score": "none", **keys})}
    )
    changed = plan.__class__(**{**vars(plan), "recipe": plan.recipe.model_copy(update={"evaluation": evaluation})})
    found = [
        one for rank in range(processes)
        for one in answer_splits(changed, model, "test", lambda part: part, rank, processes, is_divided)[1]["test"]
    ]  # fmt: skip
    return sorted(found, key=lambda answer: answer.place)


def test_batches_and_processes_change_no_text(loaded: tuple[Plan, Any]) -> None:
    whole = texts(loaded, batch=8)
    assert len(whole) == 23 and len({len(one.prompt) for one in whole}) > 4
    assert texts(loaded, batch=1) == whole
    assert texts(loaded, batch=3, processes=3) == whole
    assert texts(loaded, batch=23, processes=2) == whole, "a process without a batch"


def test_texts_are_those_of_one_prompt_at_a_time_by_hand(loaded: tuple[Plan, Any]) -> None:
    plan, model = loaded
    tokenizer: Any = plan.task.tokenizer  # type: ignore[attr-defined]
    for answer in texts(loaded)[:4]:
        ids: list[int] = tokenizer(answer.prompt)["input_ids"]
        written: list[int] = []
        while len(written) < 24:
            with torch.no_grad():
                token = int(model(torch.tensor([ids + written])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            written.append(token)
        assert tokenizer.decode(written).strip() == answer.generated


def test_stop_texts_and_rows(loaded: tuple[Plan, Any]) -> None:
    stopped = texts(loaded, stop=["####"])
    assert all("#" not in one.generated for one in stopped)
    assert any(one.generated.startswith("it is") for one in stopped)
    assert texts(loaded, max_rows=5) == texts(loaded)[:5]
    assert loaded[1].generation_config.stop_strings is None, "the model's own settings are put back"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["data.format=classification", "data.columns={text: prompt, label: completion}"],
            "label words are scored by likelihood",
        ),
        (["data.format=text", "data.columns={text: prompt}"], "running text has no prompts"),
        (["data.test=null"], "evaluation.generate answers test prompts: set data.test"),
        (["evaluation.generate.max_new_tokens=5000"], "leaves no room: the longest test prompt has"),
    ],
)
def test_refused(
    run: tuple[Path, list[str]], words: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, given = run
    off = ["evaluation.test_before=false", "data.prompt=null", f"output.dir={tmp_path / 'x'}"]
    assert main(["train", "--recipe", "tiny_cpu", *given, *off, *words, "--dry-run"]) == 2
    assert told in capsys.readouterr().err
