"""What the tests of models share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from glora_llm.models.resolve import ResolvedModel
from glora_llm.schema import ModelSection

TINY = "embedded:tiny-llama"


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
