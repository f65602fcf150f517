"""Processes as a user starts, interrupts and loses them: by `glora-llm train --gpus` and DeepSpeed's own command."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from glora_llm.cli import main
from glora_llm.launch.start import exit_code, read_hostfile
from tests.training.launching import ROOT, environment, launch

SETTINGS = [
    "tiny_cpu", "training.steps=1000", "training.global_batch=64", "training.micro_batch=4", "data.max_rows=200",
    "data.max_test_rows=20", "training.deepspeed=zero3", "output.save_every=1000",
]  # fmt: skip
LONGEST = 600


def started(command: list[str], run: Path) -> "subprocess.Popen[str]":
    """Start a command as a terminal does, in a process group of its own, and wait for a step that is new."""
    before = last_step(run)
    process = subprocess.Popen(
        ["env", "--default-signal=INT", *command], cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    limit = time.monotonic() + LONGEST
    while last_step(run) <= before:
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[0]
        time.sleep(0.05)
    return process


def last_step(run: Path) -> int:
    file = run / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return max(map(int, re.findall(r'"step": (\d+),', text)), default=0)


def training(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """Return the processes that train, in their order."""
    below = psutil.Process(process.pid).children(recursive=True)
    return sorted((child for child in below if "RANK" in child.environ()), key=lambda child: child.environ()["RANK"])


def checkpoint_steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "run"
    assert not list(Path("/dev/shm").glob("deepspeed*"))


@pytest.mark.launch
def test_interrupted_killed_and_told_by_the_launchers_end(run: Path, cache: Path) -> None:
    """Three launches of one run: Ctrl-C, the printed command with a process killed, `kill` of the launcher itself."""
    command = ["glora-llm", "train", "--gpus", "2", "--recipe", *SETTINGS, f"output.dir={run}"]
    process = started(command, run)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does for Ctrl-C
    said, _ = process.communicate(timeout=LONGEST)
    assert process.returncode == 75, said
    ended = re.search(r"told to end \(SIGINT\) after step (\d+) of 1000\. This goes on:\n  (.*)\n", said)
    assert ended is not None, said
    step = int(ended[1])
    assert checkpoint_steps(run) == [step]
    for noise in ("Traceback", "[INFO]", "[ERROR]", "[WARNING]", "KeyboardInterrupt", "GGUF"):
        assert noise not in said

    _prefix, *again = shlex.split(ended[2])  # DS_ACCELERATOR=cpu, which the environment has
    assert again == command
    process = started(again, run)
    victim, survivor = training(process)[1], training(process)[0]
    victim.send_signal(signal.SIGKILL)
    said, _ = process.communicate(timeout=LONGEST)
    assert process.returncode == 137, said
    assert f"resumed after step {step}" in said and "Traceback" not in said
    assert said.count("process 1 was killed (SIGKILL") == 1 and "process 0 failed" not in said
    assert f"step-{step}: the same command goes on from it" in said
    assert json.loads((run / "failure.json").read_text())["process_rank"] == 1
    assert not survivor.is_running()

    process = started(launch("train.py", "--recipe", *SETTINGS, f"output.dir={run}"), run)
    left = training(process)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)  # the launcher's own process: it leaves without a word to the others
    said, _ = process.communicate(timeout=LONGEST)
    _, alive = psutil.wait_procs(left, timeout=LONGEST)
    print(f"all had ended {time.monotonic() - began:.1f} s after the launcher")
    assert not alive and said.count("told to end (its launcher ended)") == 1, said
    assert checkpoint_steps(run)[-1] > step and f"output.dir={run}" in said.split("This goes on:")[1]


@pytest.mark.parametrize("gpus", ["0", "-1", "two", "", "1.5", "²"])
def test_a_wrong_number_of_processes_is_refused(gpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["train", f"--gpus={gpus}", "--recipe", "tiny_cpu", f"output.dir={tmp_path / 'run'}"])
    assert code == 2 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err == f"error: --gpus is '{gpus}'; expected a number above 0, or all.\n"


def test_more_processes_than_the_machine_has_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert main(["train", "--gpus", "100000", "--recipe", "tiny_cpu"]) == 2
    assert capsys.readouterr().err.startswith("error: --gpus is 100000; without a GPU it is one process a core at most")


def test_below_a_launcher_no_processes_are_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "--gpus", "2", "--recipe", "tiny_cpu"]) == 2
    assert "a launcher started this one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("# none\n\n", "names no machine"),
        ("node1\n", "line 1: 'node1'; expected a machine and its GPUs, as: node1 slots=8"),
        ("node1 slots=8\nnode2 slots=x\n", "line 2: 'node2 slots=x'; expected"),
        ("node1 slots=0\n", "line 1: 'node1 slots=0'; expected"),
        ("node1 slots=8\nnode1 slots=8\n", "line 2: node1 stands there twice"),
    ],
)
def test_a_wrong_hostfile_is_refused(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "hosts"
    if text is not None:
        file.write_text(text)
    assert main(["train", "--hostfile", str(file), "--recipe", "tiny_cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and str(file) in error


def test_a_hostfile_without_what_reaches_the_machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hosts"
    file.write_text("node1 slots=2  # the first\nnode2 slots=2\n")
    assert read_hostfile(file) == {"node1": 2, "node2": 2}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["train", "--hostfile", str(file), "--recipe", "tiny_cpu"]) == 2
    assert "--hostfile needs pdsh and ssh, which this machine lacks" in capsys.readouterr().err


def test_exit_codes_are_those_of_the_processes() -> None:
    assert [exit_code(code) for code in (0, 1, 2, 75)] == [0, 1, 2, 75]
    assert exit_code(247) == exit_code(-9) == 137  # DeepSpeed's launcher exits with -9 for a killed process
    assert exit_code(143) == 143 and exit_code(241) == 143


@pytest.mark.parametrize(
    ("ends", "state", "code", "requeued"),
    [
        ("touch $GLORA_LAUNCH/told-to-end; exit 137", "RUNNING", 75, ["requeue 7"]),  # srun kills whoever leaves last
        ("touch $GLORA_LAUNCH/told-to-end; exit 75", "COMPLETING", 75, []),  # scancel
        ("exit 1", "RUNNING", 1, []),
        ("exit 0", "RUNNING", 0, []),
    ],
)
def test_slurm_goes_on_with_what_was_told_to_end(
    ends: str, state: str, code: int, requeued: list[str], tmp_path: Path
) -> None:
    programs = {"srun": ends, "squeue": f"echo {state}", "scontrol": f"echo $@ >> {tmp_path}/said"}
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "1", "SLURM_NNODES": "1"}
    job |= {"SLURM_JOB_NODELIST": "node1", "SLURM_CPUS_ON_NODE": "2", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["bash", str(ROOT / "scripts" / "slurm_train.sh"), "--recipe", "tiny_cpu"]
    done = subprocess.run(script, env=os.environ | job, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    said = (tmp_path / "said").read_text().splitlines()
    assert [line for line in said if line.startswith("requeue")] == requeued
    assert not list(tmp_path.glob(".launch*"))
