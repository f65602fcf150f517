"""No hub, and a cache of the session's own."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it then

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from glora_llm.models.resolve import ResolvedModel, resolve
from glora_llm.schema import ModelSection

TINY = "embedded:tiny-llama"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("GLORA_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny(cache: Path) -> ResolvedModel:
    return resolve(ModelSection(name_or_path=TINY))


@pytest.fixture
def tiny_copy(tiny: ResolvedModel, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def section() -> Callable[..., ModelSection]:
    return lambda **keys: ModelSection(**{"name_or_path": TINY, **keys})
