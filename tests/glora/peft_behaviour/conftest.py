"""The same tiny LLaMA under PEFT's LoRA and under GLoRA, with two adapters that look trained."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from glora_llm.glora import GLoRAConfig
from tests.glora.conftest import ALL_MODES, Llama

TUNERS = ("lora", "glora")
TARGETS = ["q_proj", "v_proj", "down_proj"]
Two = Callable[..., Any]


def config(tuner: str, **keys: Any) -> PeftConfig:
    keys = {"task_type": "CAUSAL_LM", "target_modules": TARGETS, **keys}
    if tuner == "lora":
        return LoraConfig(r=2, init_lora_weights=False, **keys)
    return GLoRAConfig(rank=2, slots=dict(ALL_MODES), init_weights=False, seed=0, **keys)


@pytest.fixture
def two(llama: Llama) -> Two:
    """Return what builds the LLaMA with adapters first (active) and other, which differ, also in copies of modules.

    Both tuners draw with the same seed from the same base, so each says what the other should do, not the same numbers.
    """

    def build(tuner: str, **keys: Any) -> Any:
        model = get_peft_model(llama(), config(tuner, **keys), adapter_name="first")
        model.add_adapter("other", config(tuner, **keys))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".first." in name or ".other." in name:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        return model.eval()

    return build


def parameters(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def said(action: Callable[[], object]) -> tuple[type[BaseException], str]:
    """Return the class of PEFT's family and the words of what `action` raises."""
    with pytest.raises((ValueError, TypeError)) as caught:
        action()
    return (TypeError if isinstance(caught.value, TypeError) else ValueError), str(caught.value)
