"""A process that is killed leaves its file without its lock; one that leaves by itself takes the file away."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from glora_llm.launch.presence import Presence

STAYS = """
import sys
from glora_llm.launch.presence import Presence
with Presence(1).present():
    print("here", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("is_killed", [True, False])
def test_only_a_killed_process_is_named(is_killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLORA_LAUNCH", str(tmp_path / "launch"))
    piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    presence = Presence(0)
    with (
        subprocess.Popen([sys.executable, "-c", STAYS], text=True, **piped) as process,  # type: ignore[call-overload]
        presence.present(),
    ):
        assert process.stdout.readline() == "here\n"
        assert presence.killed() is None
        if is_killed:
            process.send_signal(signal.SIGKILL)
            process.wait()
        else:
            process.communicate("\n")
        assert presence.killed() == (1 if is_killed else None)


def test_without_a_launcher_there_is_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLORA_LAUNCH", "LOCAL_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    presence = Presence(0)
    with presence.present():
        assert presence.killed() is None
