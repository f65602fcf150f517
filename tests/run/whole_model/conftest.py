"""VLoRA language models of a few thousand numbers, trained in this process."""

from pathlib import Path

import pytest

from tests.in_process import alone, one_thread, train_in_process

__all__ = ["alone", "one_thread"]
SHIPPED = Path(__file__).parents[3] / "glora_llm" / "data" / "tinyshakespeare" / "validation.txt"
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
    """Train in this process."""
    return train_in_process(recipe, *overrides(out), *more)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, alone: None) -> Path:
    """The folder of a finished run of five steps under ZeRO 2, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(folder) == 0
    return folder
