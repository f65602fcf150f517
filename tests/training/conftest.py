"""The trainings that many tests look at."""

from pathlib import Path

import pytest

from tests.training.launching import finished, launch


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The run folders of every scenario of worker.py, trained by two ranks in one launch."""
    out = tmp_path_factory.mktemp("trained")
    done = finished(launch("tests/training/worker.py", str(out)))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return out
