"""Merge and evaluate where the data of the run are not."""

import json
import time
from pathlib import Path

import pytest

from glora_llm.cli import main
from glora_llm.evaluation.progress import Progress, progress
from glora_llm.merge.command import merge_run
from glora_llm.merge.sample import MOST_SAMPLES, MOST_TOKENS, SAMPLE, comparison_batches, keep_sample
from glora_llm.plan.elsewhere import recipe_for_merge
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from tests.merge.conftest import ALL_MODES, Train, Trained


def write_rows(file: Path, count: int = 20, words: int = 1) -> Path:
    rows = [{"prompt": f"What is {n}? {'word ' * words}", "completion": f" It is {n}."} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def moved(train: Train, tmp_path: Path) -> tuple[Trained, Path]:
    """A run whose data lie elsewhere since: the run, and their new place."""
    file = write_rows(tmp_path / "rows.jsonl")
    trained = train(slots=ALL_MODES, data={"source": str(file), "test": 3})
    return trained, file.rename(tmp_path / "moved.jsonl")


@pytest.mark.parametrize("sample", [True, False], ids=["sample", "no sample"])
def test_a_merge_needs_no_data(
    sample: bool, moved: tuple[Trained, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = moved[0].folder.path
    if not sample:
        (run / SAMPLE).unlink()
    assert main(["merge", str(run), "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["top1_agreement"] == 1.0 and report["tokens"] > 50
    assert report["text"] == "4 validation rows" if sample else "tinyshakespeare, which ships" in report["text"]
    assert report["text"] in capsys.readouterr().out


def test_a_merge_that_is_not_compared(
    moved: tuple[Trained, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(moved[0].folder.path), "--out", str(tmp_path / "out"), "--no-compare"]) == 0
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text()) == {"compared": False}
    assert "not compared with the unmerged model (--no-compare)" in capsys.readouterr().out


def test_the_run_s_own_merge_says_that_it_was_not_scored(
    moved: tuple[Trained, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = moved[0].folder
    merge_run(folder.path, folder.path / "merged")
    assert "The test rows were not scored." in capsys.readouterr().out and "test_merged" not in folder.summary()


def test_evaluate_asks_for_the_data(
    moved: tuple[Trained, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Moved rows are drawn as before; a file of its own is scored alone; no other key may be changed."""
    (trained, file), run = moved, str(moved[0].folder.path)
    assert main(["evaluate", run]) == 2
    said = capsys.readouterr().err
    assert "rows.jsonl, which is not here" in said and f"glora-llm evaluate {run} --split test data.test=FILE" in said
    assert "May be given: data.columns, data.images.own_classes, data.max_test_rows, data.source" in said
    assert main(["evaluate", run, f"data.source={file}"]) == 0
    drawn = capsys.readouterr().out
    file.rename(trained.plan.recipe.data.source)  # type: ignore[arg-type]
    assert main(["evaluate", run]) == 0 and capsys.readouterr().out == drawn
    Path(str(trained.plan.recipe.data.source)).unlink()
    for split in ("test", "validation"):
        alone = write_rows(tmp_path / f"{split}.jsonl", 6)
        assert main(["evaluate", run, "--split", split, f"data.{split}={alone}"]) == 0
        assert f"{split}/loss" in capsys.readouterr().out
    assert main(["evaluate", run, "training.lr=1"]) == 2
    assert "'training.lr=1' may not be changed here. May be given: data.columns" in capsys.readouterr().err


def test_a_sample_is_small_and_can_be_left_out(train: Train, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 40, words=100)
    trained = train(slots=ALL_MODES, data={"source": str(file), "validation": 20, "max_tokens": 2000})
    content = json.loads((trained.folder.path / SAMPLE).read_text())
    assert content["text"] == "16 validation rows" and len(content["samples"]) == MOST_SAMPLES
    assert all(len(sample["tokens"]) == MOST_TOKENS for sample in content["samples"])
    assert (trained.folder.path / SAMPLE).stat().st_size < 50_000
    (batch,), _ = comparison_batches(trained.plan, trained.folder)
    assert len(batch["targets"]) > 100, "targets that were cut off leave a loss all the same"
    output = trained.plan.recipe.output.model_copy(update={"keep_sample": False})
    without = trained.plan.recipe.model_copy(update={"output": output})
    keep_sample(make_plan(without), trained.folder)
    assert not (trained.folder.path / SAMPLE).exists()


def test_the_plan_of_a_merge_has_the_run_s_model(train: Train) -> None:
    trained = train(slots=ALL_MODES, training={"steps": None, "epochs": 2})
    recipe = recipe_for_merge(RunFolder(trained.folder.path), trained.plan.recipe)
    assert (recipe.model, recipe.adapter) == (trained.plan.recipe.model, trained.plan.recipe.adapter)
    assert recipe.training.steps and recipe.training.epochs is None


def test_a_log_file_gets_a_line_every_five_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for _ in progress(range(12), "merge", "tensor"):
        now[0] += 1
    printed = capsys.readouterr()
    assert printed.out == "merge: 5 of 12 tensors\nmerge: 10 of 12 tensors\n" and not printed.err
    twice = Progress(2, "", "part")
    for done in (1, 2, 1):
        twice.update()
        assert twice.done == done
