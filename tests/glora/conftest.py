"""A LLaMA of a few thousand numbers, and adapters that look trained."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from glora_llm.glora import GLoRAConfig, GLoRALinear

Fill = Callable[..., None]
Llama = Callable[..., LlamaForCausalLM]
IDS = torch.tensor([[1, 5, 9, 13, 17, 21], [2, 6, 10, 14, 18, 22], [3, 7, 11, 15, 19, 23]])
ALL_MODES = {"A": "lora", "B": "lora", "C": "lora", "E": "vector"}


def glora(base: nn.Module, **keys: Any) -> Any:
    return get_peft_model(base, GLoRAConfig(**{"rank": 2, "seed": 0, **keys})).eval()


@torch.no_grad()
def logits(model: Any, **keys: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS, **keys).logits
    return found


def glora_layers(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, GLoRALinear)}
    assert found
    return found


def slot_values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if "slot_" in name}


@pytest.fixture(scope="session")
def fill() -> Fill:
    """Return what gives every parameter of some adapters' slots a seeded normal value."""

    def fill_slots(module: nn.Module, seed: int = 0, std: float = 0.1, adapter: str | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        found = [
            parameter
            for name, parameter in module.named_parameters()
            if "slot_" in name and (adapter is None or f".{adapter}." in name)
        ]
        assert found
        with torch.no_grad():
            for parameter in found:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    return fill_slots


@pytest.fixture
def llama() -> Llama:
    """Return what builds the same random LLaMA at each call."""

    def build(**keys: Any) -> LlamaForCausalLM:
        sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**(sizes | heads | {"initializer_range": 0.2} | keys))).eval()

    return build
