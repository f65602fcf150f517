"""Check 6: a run that is told to end saves first, goes on from there, and ends as a whole when one process dies."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from scripts.gpu_checks.context import Context
from scripts.gpu_checks.launching import metrics, start, tail
from scripts.gpu_checks.report import Row, compared

WRITING = 4  # seconds that a checkpoint takes
TOLD_CODE = 75
TEARDOWN = 40  # seconds
PATIENCE = 300  # seconds until a run has begun to train


def check(context: Context) -> Iterator[Row]:
    """Send SIGTERM to one process of a launch, start it again, and kill one process."""
    run = context.out / "preempted"
    with_writer = _launch(context, run)
    workers = _training(with_writer, context, run, after=0)
    workers[-1].send_signal(signal.SIGTERM)
    began = time.monotonic()
    code = _code_of(with_writer)
    saved = _saved(run)
    step = int(saved[-1].removeprefix("step-")) if saved else 0
    yield compared("SIGTERM to one process: a checkpoint", "one", ", ".join(saved) or "none", bool(saved))
    early = _left_early(context.out)
    yield compared("processes that left before it was written", "none", str(early), early == 0)
    yield compared("exit code of the launch", str(TOLD_CODE), str(code), code == TOLD_CODE)
    seconds = time.monotonic() - began
    left = sum(_runs(worker) for worker in workers)
    yield compared("processes left", "none", f"{left} after {seconds:.0f} s", left == 0, seconds=seconds)

    again = _launch(context, run)
    workers = _training(again, context, run, after=step)
    yield compared("the same command goes on", f"after step {step}", "it does", True)
    os.kill(workers[-1].pid, signal.SIGKILL)
    began = time.monotonic()
    code = _code_of(again)
    seconds = time.monotonic() - began
    gone = not any(_runs(worker) for worker in workers)
    measured = f"{seconds:.0f} s, code {code}{'' if gone else ', processes left'}"
    ok = code != 0 and gone and seconds <= TEARDOWN
    yield compared("SIGKILL to one process: all have ended", f"within {TEARDOWN} s", measured, ok, seconds=seconds)


def _saved(run: Path) -> list[str]:
    return sorted(folder.name for folder in (run / "checkpoints").glob("step-*"))


def _left_early(notes: Path) -> int:
    """Return how many processes ended before the checkpoint was there."""
    written = float((notes / "written").read_text(encoding="utf-8"))
    return sum(float(file.read_text(encoding="utf-8")) < written for file in notes.glob("left-*"))


def _runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _launch(context: Context, run: Path) -> "subprocess.Popen[bytes]":
    overrides = [
        f"model.name_or_path={context.model}", "model.quantization=nf4", "model.dtype=auto", "training.deepspeed=zero3",
        "training.steps=100000", f"training.global_batch={2 * context.processes}", "training.micro_batch=2",
        "output.save_every=100000", f"output.dir={run}",
    ]  # fmt: skip
    return start(context, "scripts.gpu_checks.slow_writer", str(WRITING), str(context.out), "tiny_cpu", *overrides)


def _training(launch: "subprocess.Popen[bytes]", context: Context, run: Path, after: int) -> list[psutil.Process]:
    """Wait until a launch has trained a step beyond `after`; return its training processes."""

    def has_stepped() -> bool:
        assert launch.poll() is None, f"the launch ended with code {launch.returncode}:\n{tail(context)}"
        return max(metrics(run, "train/loss"), default=0) > after

    _wait(has_stepped)
    children = psutil.Process(launch.pid).children(recursive=True)
    return [child for child in children if "slow_writer" in " ".join(child.cmdline()) and _has_rank(child)]


def _has_rank(process: psutil.Process) -> bool:
    """Tell a training process from the launcher, whose command line names the same module."""
    return any(argument.startswith("--local_rank") for argument in process.cmdline())


def _code_of(launch: Any) -> int:
    return int(launch.wait(PATIENCE))


def _wait(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, f"nothing within {PATIENCE} s"
        time.sleep(0.05)
