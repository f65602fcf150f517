"""What a launch finds and mends before its ranks meet."""

import os
import time
from pathlib import Path

import pytest

from glora_llm.distributed import drop_stale_build_locks


def test_only_the_locks_of_builds_that_were_killed_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    stale, fresh = tmp_path / "py311_cpu" / "cpu_adam" / "lock", tmp_path / "deepspeed_shm_comm" / "lock"
    for lock in (stale, fresh):
        lock.parent.mkdir(parents=True)
        lock.touch()
    hour_ago = time.time() - 3600
    os.utime(stale, (hour_ago, hour_ago))
    assert drop_stale_build_locks() == [stale]
    assert fresh.exists() and not stale.exists()
    assert str(stale) in capsys.readouterr().out
    assert drop_stale_build_locks() == []
