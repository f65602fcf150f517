"""A launch of one rank inside the test's own process."""

from collections.abc import Iterator

import pytest
import torch

from glora_llm import distributed
from glora_llm.cli import main
from tests.test_run import forget_launch


def train_in_process(recipe: str, *overrides: str) -> int:
    """Run `glora-llm train`, and forget that it was a launch; return the exit code."""
    try:
        return main(["train", "--recipe", recipe, *overrides])
    finally:
        distributed.stop()
        forget_launch()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are cut in the same way however many cores there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
