"""A launch of one rank inside the test's own process."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from glora_llm.cli import main
from glora_llm.launch import ranks

LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def forget_launch() -> None:
    for name in LAUNCH:
        os.environ.pop(name, None)


def train_in_process(recipe: str, *overrides: str) -> int:
    """Run `glora-llm train`, and forget that it was a launch; return the exit code."""
    try:
        return main(["train", "--recipe", recipe, *overrides])
    finally:
        ranks.stop()
        forget_launch()


@pytest.fixture(scope="module")
def group(alone: None) -> Iterator[None]:
    """A process group of one."""
    ranks.start()
    yield
    ranks.stop()
    forget_launch()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are cut in the same way however many cores there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this module's own, ninja found where this Python is, and no trace of a launch, before or after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        for name in LAUNCH:
            patch.setenv(name, "")  # so that it is undone at the end
            patch.delenv(name)
        yield
        ranks.stop()
