"""A cache of the session's own, and the trainings that many tests look at."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.launching import finished, launch


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
    done = finished(launch("tests/training/worker.py", str(out)))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return out
