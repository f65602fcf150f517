"""Two gloo ranks: every ZeRO stage gives one trajectory, a resumed run is the whole one, kill -9 costs nothing."""

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.training.launching import ROOT, environment, finished, launch, metrics
from tests.training.worker import COMMON, RESUMED

pytestmark = pytest.mark.launch
EXACT = ("train/loss", "train/lr", "train/grad_norm", "validation/loss", "validation/exact_match")


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_checkpointing"])
def test_every_stage_follows_stage_zero(trained: Path, name: str) -> None:
    """Losses and norms agree to float32's summation order (offload has DeepSpeed's own Adam)."""
    for key in ("train/loss", "train/grad_norm", "validation/loss"):
        expected, got = metrics(trained / "zero0", key), metrics(trained / name, key)
        assert len(expected) >= 1
        assert got == pytest.approx(expected, rel=2e-5), key


@pytest.mark.parametrize("name", ["adalora_zero2", "adalora_zero3"])
def test_adalora_prunes_alike_under_every_stage(trained: Path, name: str) -> None:
    """It reads whole gradients: importance, and the ranks that are kept, are those of stage 0, the penalty included."""
    for key in ("train/loss", "train/grad_norm", "validation/loss"):
        assert metrics(trained / name, key) == pytest.approx(metrics(trained / "adalora", key), rel=2e-5), key
    expected, found = (json.loads((trained / one / "adapter/adalora.json").read_text()) for one in ("adalora", name))
    assert found == expected
    kept = [flag for flags in found["rank_pattern"].values() for flag in flags]
    assert 0 < sum(kept) < len(kept)
    middle = [load_file(trained / one / "checkpoints/step-3/adapter/adalora.safetensors") for one in ("adalora", name)]
    assert middle[0].keys() == middle[1].keys() and middle[0]
    for tensor, importance in middle[0].items():
        torch.testing.assert_close(middle[1][tensor], importance, rtol=1e-3, atol=1e-10)


def test_periodic_lora_unloads_between_two_checkpoints(trained: Path) -> None:
    """The unloading is behind step 3, as the checkpoint is, which the resumed run goes on from."""
    ranks = []
    for folder in ("checkpoints/step-3/adapter", "adapter"):
        saved = load_file(trained / "periodic_lora" / folder / "adapter_model.safetensors")
        ranks += [{len(tensor) for name, tensor in saved.items() if name.endswith("lora_past.down")}]
    assert ranks == [{4}, {4}]


def test_dropout_is_on_in_these_runs(trained: Path) -> None:
    assert metrics(trained / "no_dropout", "train/loss")[6] != pytest.approx(
        metrics(trained / "zero1", "train/loss")[6], abs=1e-4
    )


def test_other_optimizers_and_methods_train(trained: Path) -> None:
    for name in ("adamw_8bit", "lora", "bfloat16"):
        losses = metrics(trained / name, "train/loss")
        assert losses[6] < losses[1] - 0.5, name


def test_float16_finds_its_loss_scale(trained: Path) -> None:
    """Steps that overflow are skipped and are no bad steps, of which the first would have ended this run."""
    scale, norm = metrics(trained / "float16", "train/loss_scale"), metrics(trained / "float16", "train/grad_norm")
    skipped = [step for step in scale if norm[step] is None]
    assert skipped and all(scale[step] == scale.get(step - 1, 2.0**19) / 2 for step in skipped)
    assert any(scale[step] == 2 * scale[step - 1] for step in scale if step > 1), "it never rose"
    summary = json.loads((trained / "float16" / "summary.json").read_text())
    assert summary["skipped_steps"] == len(skipped) < 6
    first = next(step for step in norm if norm[step] is not None)
    assert norm[first] == pytest.approx(metrics(trained / "zero3", "train/grad_norm")[1], rel=0.3), "not unscaled"


def test_zero3_shards_the_nf4_base(trained: Path) -> None:
    """A rank of two holds half of what it holds under ZeRO 1, blocks of 4 bits included."""
    held = {
        name: json.loads((trained / name / "summary.json").read_text())["bytes_per_rank"] for name in ("zero1", "zero3")
    }
    assert held["zero3"] < 0.55 * held["zero1"]


@pytest.mark.parametrize("name", [name for name in RESUMED if name != "adamw_8bit"])
def test_a_resumed_run_is_the_uninterrupted_one(trained: Path, name: str) -> None:
    """Bit for bit: losses, learning rates, norms, scores and the adapter's bytes, cut in mid-epoch."""
    for key in EXACT:
        whole, resumed = metrics(trained / name, key), metrics(trained / f"{name}-resumed", key)
        assert resumed and resumed == {step: value for step, value in whole.items() if step > 3}, key
    assert adapter_bytes(trained / name) == adapter_bytes(trained / f"{name}-resumed")


def test_a_resumed_8_bit_optimizer_goes_on_to_rounding(trained: Path) -> None:
    """Its codes come back as they were, the scale of a block to float32 rounding: steps differ in the last digits."""
    for key in ("train/loss", "train/grad_norm"):
        whole, resumed = metrics(trained / "adamw_8bit", key), metrics(trained / "adamw_8bit-resumed", key)
        assert resumed == pytest.approx({step: value for step, value in whole.items() if step > 3}, rel=1e-5), key


def test_a_checkpoint_knows_no_stage_and_no_ranks(trained: Path, tmp_path: Path) -> None:
    """States of different stages after the same steps hold the same tensors under the same names."""
    states = [load_file(trained / name / "checkpoints/step-3/state.safetensors") for name in ("zero0", "zero3")]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 100
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "adamw_8bit"])
def test_a_checkpoint_takes_three_collectives_a_group(trained: Path, name: str) -> None:
    """One for the masters and one for each moment of three groups (of learning rates), not three for each of 84."""
    assert len(load_file(trained / name / "checkpoints/step-3/state.safetensors")) == 3 * 84
    counts = json.loads((trained / name / "collectives.json").read_text())
    assert counts == [0 if name == "zero0" else 9] * 3  # at steps 3 and 6, and of the result


def test_non_finite_steps_end_the_run_with_the_module_and_keep_what_was_there(trained: Path) -> None:
    message = (trained / "broken" / "error.txt").read_text()
    assert "2 steps in a row" in message and "First bad module: base_model" in message
    assert not (trained / "broken" / "adapter").exists()


def test_one_rank_follows_two(trained: Path, tmp_path: Path) -> None:
    """One rank with twice the accumulation has the losses of two: normalised by the targets of the whole step."""
    command = [f"output.dir={tmp_path / 'one'}", *COMMON, "adapter.dropout=0"]
    done = finished(launch("train.py", "--recipe", "tiny_cpu", *command, ranks=1))
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics(tmp_path / "one", "train/loss") == pytest.approx(
        metrics(trained / "no_dropout", "train/loss"), rel=1e-5
    )
    assert metrics(tmp_path / "one", "validation/loss") == pytest.approx(
        metrics(trained / "no_dropout", "validation/loss"), rel=1e-5
    )


@contextlib.contextmanager
def started(command: list[str], awaited: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a launch, and wait until a file or folder is there that it makes."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        limit = time.monotonic() + 900
        while not awaited.exists():
            assert process.poll() is None and time.monotonic() < limit, f"no {awaited.name} appeared"
            time.sleep(0.002)
        yield process


WORKER = "tests/training/interrupted_worker.py"


def test_killed_and_started_again_ends_with_the_same_adapter(trained: Path, tmp_path: Path) -> None:
    """SIGKILL to the launcher and all ranks behind the first checkpoint; the same command again goes on."""
    run = tmp_path / "killed"
    settings = ["tiny_cpu", *COMMON, "training.deepspeed=zero3", f"output.dir={run}"]
    command = launch(WORKER, "hangs", *settings)
    with started(command, run / "checkpoints" / "step-3") as process:
        kill_all(process.pid)
    assert not (run / "adapter").exists()
    port = command[command.index("--master_port") + 1]
    assert not list(Path("/dev/shm").glob(f"deepspeed*{port}*")), "memory that nobody gives back"
    done = finished(launch("train.py", "--recipe", *settings))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed after step 3" in done.stdout
    assert adapter_bytes(run) == adapter_bytes(trained / "zero3")
    assert metrics(run, "train/loss") == metrics(trained / "zero3", "train/loss")


def test_told_to_end_all_ranks_save_and_the_same_command_goes_on(trained: Path, tmp_path: Path) -> None:
    """SIGTERM to one process in its third step, which is left out; none leaves before the checkpoint is there."""
    run = tmp_path / "preempted"
    settings = ["tiny_cpu", *COMMON, "training.deepspeed=zero3", "output.save_every=100", f"output.dir={run}"]
    told = finished(launch(WORKER, "is_preempted", *settings))
    assert told.returncode == 75, told.stderr[-3000:]
    said = "told to end (a signal to another process) after step 2 of 6. This goes on:\n  DS_ACCELERATOR=cpu deepspeed"
    assert said in told.stdout
    assert [saved.name for saved in (run / "checkpoints").iterdir()] == ["step-2"]
    assert not (run / "left-early").exists(), "process 1 left before the checkpoint was there"
    done = finished(launch("train.py", "--recipe", *settings))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed after step 2" in done.stdout
    assert adapter_bytes(run) == adapter_bytes(trained / "zero3")
    assert "Traceback" not in told.stderr
    assert metrics(run, "train/loss") == metrics(trained / "zero3", "train/loss")


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants (the launcher starts its ranks in sessions of their own)."""
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def kill_all(pid: int) -> None:
    """Kill a process and all its descendants at once."""
    for member in family(pid):
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def test_wrong_input_ends_with_code_2_and_one_message(tmp_path: Path) -> None:
    wrong = ["training.global_batch=20", "training.micro_batch=5", "adapter.targets=[qq]"]
    done = finished(launch("train.py", "--recipe", "tiny_cpu", *wrong, f"output.dir={tmp_path / 'wrong'}"))
    assert done.returncode == 2
    assert done.stderr.count("matches no module") + done.stdout.count("matches no module") == 1
    assert "q_proj" in done.stderr


def test_the_rank_that_failed_first_is_named_with_the_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    run = tmp_path / "failing"
    done = finished(launch(WORKER, "fails", "tiny_cpu", *COMMON, f"output.dir={run}"))
    assert done.returncode not in (0, 2)
    report = json.loads((run / "failure.json").read_text())
    assert report["process_rank"] == 1 and "the disk of process 1 went away" in report["traceback"]
    assert "process 1 failed first: OSError" in done.stdout
    assert "step-3: the same command goes on from it" in done.stdout
    assert done.stderr.count("Traceback") == 1, "only the first failure has a traceback"
