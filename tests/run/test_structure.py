"""A run within `adapter.budget`: the structure is chosen once, by gradients or evenly, and is a genome from then on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glora_llm.cli import main
from glora_llm.glora.path import genome_from_json
from tests.in_process import alone, one_thread, train_in_process
from tests.run.test_train import overrides, write_rows

__all__ = ["alone", "one_thread"]
CHOSEN = ["adapter.slots=null", "adapter.scaling=even", "training.lr=auto", "model.quantization=nf4"]
BUDGET = ["adapter.budget=4000", "adapter.predictor=agreement", "adapter.budget_rows=32", "data.max_rows=null"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("structure")
    settings = overrides(write_rows(folder / "data.jsonl", 80), folder / "run")
    assert train_in_process("tiny_cpu", *settings, *CHOSEN, *BUDGET) == 0
    return folder / "run"


def choice(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "structure" / "choice.json").read_text())
    return found


def test_the_structure_is_within_the_budget_and_the_best_of_its_scores(run: Path) -> None:
    found, genome = choice(run), genome_from_json((run / "genome.json").read_text())
    assert 3000 < found["parameters"] <= 4000
    assert found["parameters"] == json.loads((run / "summary.json").read_text())["trained_parameters"]
    assert found["score"] > 0 and found["bound"] == pytest.approx(found["score"], rel=1e-5)
    assert found["samples"] == 32 and found["budget"] == ["4000"]
    table = json.loads((run / "structure" / "scores.json").read_text())
    total = 0.0
    for name, path in genome.items():
        for slot, spec in path.active():
            total += table[name][slot][f"{spec.mode} {spec.rank}" if spec.rank else spec.mode]
    assert total == pytest.approx(found["score"], rel=1e-5)
    assert len({spec for path in genome.values() for spec in path.active()}) > 1, "it chose one thing everywhere"
    assert (run / "structure" / "modes.png").stat().st_size > 1000


def test_a_resumed_run_does_not_choose_again(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = tmp_path / "run"
    shutil.copytree(run, again)
    for name in ("checkpoints/step-2", "adapter", "structure"):
        shutil.rmtree(again / name)
    (again / "summary.json").unlink()
    monkeypatch.setattr("glora_llm.run.structure._choose", None)
    settings = overrides(run.parent / "data.jsonl", again)
    assert train_in_process("tiny_cpu", *settings, *CHOSEN, *BUDGET) == 0
    whole, resumed = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, again))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_it_is_scored_and_merged_as_a_genome(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--split", "validation"]) == 0, capsys.readouterr().err
    loss = json.loads((run / "summary.json").read_text())["validation"]["validation/loss"]
    assert f"{loss:.4f}" in capsys.readouterr().out
    assert main(["merge", str(run), "--out", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["max_abs_logit_diff"] < 1e-4


def test_an_even_structure_needs_no_gradients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Few samples are enough for it; a dry run counts the same."""
    settings = overrides(write_rows(tmp_path / "data.jsonl", 24), tmp_path / "run")
    more = [*settings, "adapter.slots=null", "adapter.budget=4000", "training.lr=auto", "adapter.scaling=even"]
    assert main(["train", "--recipe", "tiny_cpu", "--dry-run", *more]) == 0
    said = capsys.readouterr().out
    assert "for training.lr auto" in said and "within 4000, evenly" in said
    assert train_in_process("tiny_cpu", *more) == 0
    found = choice(tmp_path / "run")
    assert found["samples"] == 0 and found["parameters"] <= 4000
    assert f"{found['parameters'] / 1e6:.3f} M trained" in said
    genome = genome_from_json((tmp_path / "run" / "genome.json").read_text())
    assert {slot for path in genome.values() for slot, _ in path.active()} == {"B"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["adapter.budget=3"], "is below the smallest structure"),
        (["adapter.budget=few"], "adapter.budget 'few' is no limit; expected parameters"),
        (["adapter.budget=4000", "adapter.predictor=curvature", "data.max_rows=20"], "needs gradients of 32"),
        (["adapter.predictor=curvature"], "predictor and budget_rows are of adapter.budget"),
        (["adapter.budget=1M", "adapter.paths=sample"], "budget chooses the slots of every layer, and paths says"),
        (["adapter.budget=1M", "adapter.method=lora"], "belongs to method glora, not to 'lora'"),
        (["adapter.budget=1M", "adapter.slots={A: block}"], "in mode block"),
        (["training.lr=auto", "adapter.method=full"], "training.lr is auto, which is one rate for glora, lora"),
    ],
)
def test_what_is_refused(more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = overrides(write_rows(tmp_path / "data.jsonl"), tmp_path / "run")
    assert train_in_process("tiny_cpu", *settings, "adapter.slots=null", *more) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "recipe.yaml").exists()
