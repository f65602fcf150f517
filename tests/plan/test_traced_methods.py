"""The step of a method that is followed without values holds as many bytes as a real one, counted in the same way."""

from pathlib import Path
from typing import Any

import pytest
import torch

from glora_llm.adapters.inject import without_adapter
from glora_llm.models.random_llama import TINY, llama_config
from glora_llm.plan import step_memory
from glora_llm.plan.live_storages import LiveStorages
from glora_llm.plan.memory import FOLLOWED_METHODS
from glora_llm.plan.step_memory import StepShape, measured_parts
from glora_llm.schema import AdapterSection, ModelSection
from tests.run.methods_walk import NEEDED


def real_peak(shape: StepShape) -> int:
    """Return the most bytes that a real step of the CPU holds beside weights, whole gradients and the batch."""
    model = step_memory._adapted(shape, TINY.layers).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.normal_(0, 0.02) if tensor.is_floating_point() else tensor.zero_()
    objective: Any = shape.objective(without_adapter(model)).train()
    batch = step_memory._full_batch(shape)
    for parameter in objective.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(step_memory._let_go)
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    with LiveStorages([*objective.parameters(), *objective.buffers(), *tensors]) as live:
        step_memory._run("training", model, objective, batch, live)
    return live.peak


def compared(method: str, checkpointing: bool, folder: Path) -> tuple[int, int]:
    """Return the peak of a step that is followed, and that of a real one."""
    llama_config(TINY).save_pretrained(folder)
    section = ModelSection(name_or_path="none", dtype="float32", gradient_checkpointing=checkpointing)
    adapter = AdapterSection(method=method, peft=NEEDED.get(method))
    shape = StepShape(section, folder, adapter, 2, 48, torch.float32)
    return measured_parts(shape, TINY.layers).total, real_peak(shape)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_followed_step_is_a_real_one(checkpointing: bool, tmp_path: Path) -> None:
    """But for attention, which without values keeps some bytes more a layer, as LoRA's step tells."""
    followed, real = compared("lora", checkpointing, tmp_path / "lora")
    attention = followed - real
    assert 0 <= attention < 0.1 * real
    for method in FOLLOWED_METHODS:
        followed, real = compared(method, checkpointing, tmp_path / method)
        assert followed - real in (attention, attention / 2), method  # of both layers, or of the one at the peak
        assert real > 100_000
