"""An error is printed once a launch, whichever processes find it, and none is lost."""

import subprocess
import sys
from pathlib import Path

import pytest

from glora_llm.launch import complaint

FIND = "import sys; from glora_llm.launch.complaint import print_error; print_error(sys.argv[1])"
# A launcher of its own for the processes that are started below it.
LAUNCHER = """
import os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
def start(message):
    return subprocess.run([sys.executable, "-c", sys.argv[1], message], stderr=subprocess.PIPE, text=True, check=True)
with ThreadPoolExecutor() as pool:
    print("".join(done.stderr for done in pool.map(start, sys.argv[2:])), end="")
"""


def said(monkeypatch: pytest.MonkeyPatch, folder: Path, *messages: str) -> list[str]:
    """Return the lines that the processes of one launch printed, each of which found one error."""
    monkeypatch.setenv("TMPDIR", str(folder))
    done = subprocess.run([sys.executable, "-c", LAUNCHER, FIND, *messages], capture_output=True, text=True, check=True)
    return sorted(done.stdout.splitlines())


def test_every_error_is_printed_once_a_launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOCAL_SIZE", "4")
    for _ in range(2):  # the second launch prints again
        assert said(monkeypatch, tmp_path, "no model", "no model", "no disk", "no model") == [
            "error: no disk",
            "error: no model",
        ]
    assert len(list(tmp_path.iterdir())) == 1, "the second launch removes what the first one left"


def test_machines_of_one_launch_share_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLORA_LAUNCH", str(tmp_path / "launch"))
    assert said(monkeypatch, tmp_path, "no model", "no model") == ["error: no model"]
    assert said(monkeypatch, tmp_path, "no model", "no disk") == ["error: no disk"]


def test_without_a_launcher_or_a_folder_every_error_is_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("GLORA_LAUNCH", "LOCAL_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert complaint.launch_folder() is None
    complaint.print_error("once")
    monkeypatch.setenv("GLORA_LAUNCH", str(tmp_path / "absent" / "launch"))
    complaint.print_error("twice")
    assert capsys.readouterr().err == "error: once\nerror: twice\n"
