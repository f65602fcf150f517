"""Trials start as new interpreters or as forks; either way they are processes of their own, and say how they ended."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from glora_llm.compare.starting import Forked, NewInterpreter, Started, Starter
from glora_llm.launch.launcher import STARTER, Launcher

STARTERS: dict[str, Callable[[], Starter]] = {"new": NewInterpreter, "forked": lambda: Forked("1")}
LONGEST = 120.0  # seconds


def end_of(process: Started) -> int:
    limit = time.monotonic() + LONGEST
    while (code := process.poll()) is None and time.monotonic() < limit:
        time.sleep(0.02)
    assert code is not None, "it runs still"
    return code


def leads_a_group(process: Started) -> bool:
    """Tell whether a process that runs, or has ended since, became the first of a process group."""
    with contextlib.suppress(ProcessLookupError):
        while process.poll() is None:
            if os.getpgid(process.pid) == process.pid:
                return True
    return False


@pytest.mark.parametrize("kind", STARTERS)
def test_a_command_runs_apart_and_gives_its_exit_code(kind: str, tmp_path: Path) -> None:
    starter = STARTERS[kind]()
    environment = dict(os.environ) | {"GLORA_DATA": "nowhere"}
    said = []
    for number, (command, code) in enumerate(
        [(["recipes"], 0), (["train", "--recipe", "tiny_cpu", "data.source=gone.jsonl", "--dry-run"], 2)]
    ):
        log = tmp_path / f"{number}.log"
        log.write_text("before\n")
        process = starter.start(command, environment, log)
        assert leads_a_group(process), "Ctrl-C of the terminal does not reach it"
        assert end_of(process) == code
        said.append(log.read_text())
    assert all(text.startswith("before\n") for text in said)
    assert "tiny_cpu" in said[0] and "nowhere/gone.jsonl" in said[1]
    assert os.environ.get("GLORA_DATA") != "nowhere"


def test_a_launch_notices_that_its_starter_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    starter = psutil.Popen(["sleep", "60"])
    monkeypatch.setenv(STARTER, str(starter.pid))
    launcher = Launcher()
    assert not launcher.is_gone()
    starter.kill()
    limit = time.monotonic() + LONGEST
    while not launcher.is_gone() and time.monotonic() < limit:
        time.sleep(0.02)
    assert launcher.is_gone(), "killed, and not waited for"
    starter.wait()
    assert launcher.is_gone() and Launcher().is_gone(), "waited for; gone before"
    monkeypatch.delenv(STARTER)
    assert not Launcher().is_gone()
