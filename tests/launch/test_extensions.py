"""Compiled extensions: a build that is killed at any moment costs the next start nothing but the build."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glora_llm.launch.extensions import LOCK, NOTE, abandoned, extensions_root

LOAD = "from glora_llm.launch.extensions import load_extension; load_extension('CPUAdamBuilder'); print('loaded')"


def locks(root: Path, *extensions: str) -> list[Path]:
    """What torch leaves of builds that were killed."""
    found = [root / extension / "lock" for extension in extensions]
    for lock in found:
        lock.parent.mkdir(parents=True)
        lock.touch()
    return found


def test_the_file_of_a_build_that_we_began_is_abandoned_and_others_only_when_they_are_old(tmp_path: Path) -> None:
    ours, young, old = locks(tmp_path, "cpu_adam", "py311_cpu/another", "py311_cpu/fused_adam")
    hour_ago = time.time() - 3600
    os.utime(old, (hour_ago, hour_ago))
    assert list(abandoned(tmp_path)) == [old]
    (tmp_path / NOTE).write_text("cpu_adam")
    assert set(abandoned(tmp_path)) == {ours, old}
    assert young.exists()


def test_every_environment_has_extensions_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "restored at the end")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert extensions_root() == Path("restored at the end"), "the user's choice stands"
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert extensions_root() == tmp_path / "torch_extensions" == Path(os.environ["TORCH_EXTENSIONS_DIR"])
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert extensions_root().name == "torch_extensions" and "TORCH_EXTENSIONS_DIR" not in os.environ


@pytest.mark.slow
@pytest.mark.reliability
def test_a_build_that_is_killed_does_not_block_the_next_one(tmp_path: Path) -> None:
    """SIGKILL in the middle of the compiler's run; then two processes at once, as two ranks would."""
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", LOAD]
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lock = tmp_path / "cpu_adam" / "lock"
    deadline = time.monotonic() + 900
    while not lock.exists():
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0].decode()
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert lock.exists() and (tmp_path / NOTE).read_text() == "cpu_adam"

    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=900)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all("loaded" in text for text in said)
    assert sum("left by a build that was killed" in text for text in said) == 1
    assert {path.name for path in tmp_path.iterdir()} == {LOCK, "cpu_adam"}
    assert not lock.exists()
