"""A cache of the session's own, and the trainings that many tests look at."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.launching import ROOT, environment, launch


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("GLORA_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The run folders of every scenario of worker.py, trained by two ranks in one launch."""
    out = tmp_path_factory.mktemp("trained")
    command = launch("tests/training/worker.py", str(out))
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return out
