"""The checkpoint that validates best is kept and deployed, and training ends when no better one comes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from glora_llm.cli import main
from glora_llm.training.checkpoint import MANIFEST, write_manifest
from tests.in_process import alone, one_thread, train_in_process
from tests.run.test_train import overrides, write_rows

__all__ = ["alone", "one_thread"]
# a rate at which the validation loss falls, and then rises
RISES = ["training.steps=12", "training.lr=0.06", "training.schedule=constant", "evaluation.every=2"]
RISES += ["output.save_every=5", "output.keep=1", "training.global_batch=4", "training.micro_batch=4", "data.test=8"]
LEFT_OUT = {"seconds", "peak_memory_gb", "predicted_peak_gb", "load_peak_gb"}


def train(out: Path, *more: str) -> int:
    data = write_rows(out.parent / "data.jsonl")
    return train_in_process("tiny_cpu", *overrides(data, out), *RISES, *more)


def validations(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["validation/loss"] for line in lines if "validation/loss" in line}


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return {key: value for key, value in found.items() if key not in LEFT_OUT}


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def steps_kept(run: Path) -> set[int]:
    return {int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir()}


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory, alone: None) -> Path:
    """A run of 12 steps that keeps its best checkpoint, one of those before the last."""
    run = tmp_path_factory.mktemp("best") / "run"
    assert train(run, "evaluation.keep_best=true") == 0
    return run


def test_the_best_is_kept_beside_the_newest_and_deployed(best: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = validations(best)
    step = min(losses, key=lambda one: losses[one])
    assert set(losses) == {2, 4, 6, 8, 10, 12} and 2 <= step < 10, losses  # or the test shows nothing
    assert steps_kept(best) == {step, 12}
    assert weights(best) == weights(best / "checkpoints" / f"step-{step}")
    assert weights(best) != weights(best / "checkpoints" / "step-12")
    found = summary(best)
    assert found["best"] == {"score": "validation/loss", "value": losses[step], "step": step}
    assert (found["steps"], found["deployed_step"], found["stopped_early"]) == (12, step, None)
    assert found["validation"]["validation/loss"] == pytest.approx(losses[step], abs=1e-6)
    for more in ([], ["--best"], ["--step", str(step)]):
        assert main(["evaluate", str(best), *more]) == 0
        assert f"test/loss                    {found['test']['test/loss']:.4f}" in capsys.readouterr().out
    assert main(["evaluate", str(best), "--best", "--step", "12"]) == 2


@pytest.mark.parametrize("at", [3, 6], ids=["behind a step", "behind the best validation"])
def test_a_run_that_goes_on_keeps_the_same(best: Path, tmp_path: Path, at: int) -> None:
    run = tmp_path / "run"
    assert train(run, "evaluation.keep_best=true", f"output.stop_after={at}") == 75
    assert train(run, "evaluation.keep_best=true") == 0
    assert weights(run) == weights(best)
    assert steps_kept(run) == steps_kept(best) and validations(run) == validations(best)
    assert summary(run)["best"] == summary(best)["best"]
    assert summary(run)["test"] == summary(best)["test"]


def test_a_validation_that_no_checkpoint_knows_of_counts(best: Path, tmp_path: Path) -> None:
    """Told to end in it, and killed behind it: it is in metrics.jsonl, and the checkpoint is of the time before."""
    run = tmp_path / "run"
    assert train(run, "evaluation.keep_best=true", "output.stop_after=6") == 75
    folder, losses = run / "checkpoints" / "step-6", validations(best)
    trainer = json.loads((folder / "trainer.json").read_text())
    trainer["best"] |= {"score": losses[4], "step": 4, "seen": 4, "kept": 4}
    (folder / "trainer.json").write_text(json.dumps(trainer))
    (folder / MANIFEST).unlink()
    write_manifest(folder)
    assert train(run, "evaluation.keep_best=true") == 0
    assert weights(run) == weights(best) and summary(run)["best"] == summary(best)["best"]
    assert validations(run) == losses


def test_a_damaged_best_checkpoint_is_said(best: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(best, run)
    step = summary(run)["deployed_step"]
    (run / "checkpoints" / f"step-{step}" / "state.safetensors").unlink()
    shutil.rmtree(run / "adapter")
    assert train(run, "evaluation.keep_best=true", f"data.source={best.parent / 'data.jsonl'}") == 0
    said = capsys.readouterr().out
    assert f"warning: the best checkpoint (validation/loss, step {step}) cannot be taken: state.safetensors is" in said
    assert weights(run) == weights(run / "checkpoints" / "step-12") and summary(run)["deployed_step"] == 12


def test_training_ends_early_and_decides_so_again(
    best: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, losses = tmp_path / "run", validations(best)
    step = min(losses, key=lambda one: losses[one])
    patient = ["evaluation.keep_best=loss", "evaluation.patience=1"]
    assert train(run, *patient) == 0
    found = summary(run)
    assert (found["steps"], found["deployed_step"]) == (step + 2, step)
    assert found["stopped_early"].startswith("validation/loss was not better for 1 validations (evaluation.patience): ")
    assert weights(run) == weights(best) and set(validations(run)) == set(range(2, step + 3, 2))
    capsys.readouterr()
    before = (run / "summary.json").read_bytes()
    assert train(run, *patient) == 0  # the same command again finds it ended
    assert "training had ended already" in capsys.readouterr().out
    assert (run / "summary.json").read_bytes() == before
    shutil.rmtree(run / "adapter")
    assert train(run, *patient) == 0  # and writes again what is missing
    assert weights(run) == weights(best) and summary(run) == found
    assert train(run, "evaluation.keep_best=loss") == 0  # more patience: it goes on
    assert summary(run)["best"] == summary(best)["best"] and summary(run)["steps"] == 12
    assert summary(run)["stopped_early"] is None and weights(run) == weights(best)


def test_patience_alone_deploys_the_last(best: Path, tmp_path: Path) -> None:
    run, losses = tmp_path / "run", validations(best)
    step = min(losses, key=lambda one: losses[one])
    assert train(run, "evaluation.patience=1") == 0
    assert summary(run)["deployed_step"] == summary(run)["steps"] == step + 2
    assert weights(run) == weights(run / "checkpoints" / f"step-{step + 2}")
    assert main(["merge", str(run), "--out", str(tmp_path / "merged"), "--best"]) == 2
