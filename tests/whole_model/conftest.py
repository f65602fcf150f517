"""VLoRA language models of a few thousand numbers, trained in this process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from glora_llm import distributed
from glora_llm.cli import main
from tests.test_run import alone, forget_launch

__all__ = ["alone"]
SHIPPED = Path(__file__).parents[2] / "glora_llm" / "data" / "tinyshakespeare" / "validation.txt"
SMALL = [
    "model.config.hidden_size=32", "model.config.intermediate_size=48", "model.tokenizer=train:400",
    "vlora.layers_per_compound=2",
    "data.max_tokens=48", "data.validation=test", "data.test=null", "training.steps=5", "training.warmup=0",
    "training.global_batch=8", "training.micro_batch=2", "output.save_every=1", "output.keep=9",
    "merge.after_training=false", "evaluation.batch=16",
]  # fmt: skip


def overrides(out: Path) -> list[str]:
    """vlora_lm_tiny, smaller still: five steps of eight rows of 48 tokens."""
    return [f"data.source={SHIPPED.parent}", "data.split=validation", *SMALL, f"output.dir={out}"]


def train(out: Path, *more: str, recipe: str = "vlora_lm_tiny") -> int:
    """Run `glora-llm train` in this process, and forget that it was a launch."""
    try:
        return main(["train", "--recipe", recipe, *overrides(out), *more])
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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, alone: None) -> Path:
    """The folder of a finished run of five steps under ZeRO 2, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(folder) == 0
    return folder
