"""`glora-llm verify-resume`: a run is killed, goes on with another number of processes, and is compared."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from glora_llm.cli import main
from glora_llm.errors import UserError
from glora_llm.launch.deterministic import check_deterministic
from glora_llm.plan.run_folder import RunFolder
from glora_llm.recipe import load
from glora_llm.run.verify_resume import Trial, kill_points, proof_of

SMALL = ("training.steps=6", "output.save_every=2", "data.validation=null", "data.test=null")


def test_kill_points_are_drawn_by_the_seed() -> None:
    drawn = kill_points(20, 5, seed=3)
    assert drawn == kill_points(20, 5, seed=3) != kill_points(20, 5, seed=4)
    assert len(set(drawn)) == 5 and list(drawn) == sorted(drawn) and drawn[0] >= 1 and drawn[-1] < 20
    with pytest.raises(UserError, match="a run of 4 steps has 3 before its last"):
        kill_points(4, 4, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kill-after", "20"], "expected different steps from 1 to 19"),
        (["--kill-after", "3", "3"], "--kill-after is 3 3"),
        (["--kills", "40"], "a run of 20 steps has 19 before its last"),
        (["--kills", "1", "--gpus", "0"], "--gpus is '0'"),
        (["--kills", "1", "--then", "none"], "--then is 'none'"),
        (["--kills", "1", "--tolerance", "2"], "--tolerance is 2.0; expected"),
        (["--kills", "1", "training.steps=null", "training.epochs=1"], "give training.steps=N"),
        (["--kills", "1", "training.lrr=1"], "Did you mean 'lr'?"),
        (["--kills", "1", "--deterministic", "training.optimizer=adamw_8bit"], "Use adamw; or set training.det"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_what_is_wrong_is_one_message(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify-resume", "--recipe", "tiny_cpu", "--out", str(tmp_path / "proof"), *arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "proof").exists()


def test_a_folder_that_is_there_is_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify-resume", "--recipe", "tiny_cpu", "--kills", "1", "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "device", "reason"),
    [
        (["training.optimizer=adamw_8bit"], "cpu", "Use adamw"),
        (["model.compile=true"], "cpu", "model.compile=false"),
        ([], "cuda", "model.attention=eager"),
        (["model.attention=eager"], "cuda", "model.kernels=none"),
        (["model.attention=eager", "model.kernels=none", "model.quantization=int8"], "cuda", "quantization=nf4"),
    ],
)
def test_what_has_no_deterministic_way_is_refused(overrides: list[str], device: str, reason: str) -> None:
    recipe = load("tiny_cpu", ["training.deterministic=true", *overrides])
    with pytest.raises(UserError, match=reason):
        check_deterministic(recipe, torch.device(device))
    check_deterministic(load("tiny_cpu"), torch.device("cpu"))


def write_run(folder: Path, value: float, loss: float) -> RunFolder:
    """Write what a comparison reads of a run."""
    run = RunFolder(folder)
    run.write("recipe.yaml", json.dumps(load("tiny_cpu").model_dump(mode="json")))
    run.write("base.json", json.dumps({"name": "a", "fingerprint": "b", "dtype": "float32"}))
    run.write("metrics.jsonl", json.dumps({"step": 1, "train/loss": loss, "train/lr": 1.0, "train/grad_norm": 1.0}))
    run.adapter.mkdir()
    save_file({"a": torch.full((4,), value)}, run.adapter / "adapter_model.safetensors")
    return run


@pytest.mark.parametrize(
    ("then", "value", "loss", "passes"),
    [(1, 1.0, 2.0, True), (1, 1.0, 2.1, False), (1, 1.0001, 2.0, False), (2, 1.0001, 2.0, True), (2, 1.1, 2.0, False)],
)
def test_bytes_are_asked_of_one_count_and_a_tolerance_of_two(
    then: int, value: float, loss: float, passes: bool, tmp_path: Path
) -> None:
    whole, killed = write_run(tmp_path / "whole", 1.0, 2.0), write_run(tmp_path / "killed", value, loss)
    trial = Trial("tiny_cpu", (), 1, then, (1,), 1e-3, tmp_path)
    proof = proof_of(trial, whole, killed, [{"processes": 1, "killed_after_step": 1}])
    assert proof["passed"] is passes
    assert proof["relative_difference"]["weights"] == pytest.approx(value - 1, rel=1e-3, abs=1e-9)


@pytest.mark.launch
def test_a_killed_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    out = tmp_path / "proof"
    command = ["verify-resume", "--recipe", "tiny_cpu", "--then", "2", "--kill-after", "3", "--out", str(out), *SMALL]
    assert main([*command, "--deterministic"]) == 0
    proof = json.loads((out / "proof.json").read_text())
    assert [start["processes"] for start in proof["starts"]] == [1, 2] and proof["starts"][0]["killed_after_step"] >= 3
    assert proof["passed"] and proof["tolerance"] == 1e-4 and proof["relative_difference"]["losses"] < 1e-5
    assert len(proof["losses"]["killed"]) == 6 and proof["versions"]["torch"] == torch.__version__
