"""Stacks, a LLaMA and a ViT of a few thousand numbers, made into VLoRA, and what their dense twins compute."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from glora_llm.vlora import VLoRAConfig, make_compounds, vlora_layers

LAYERS, WIDTH = 4, 16
IDS = torch.tensor([[1, 5, 9, 13, 17, 21], [2, 6, 10, 14, 18, 22]])
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
FORMS = [(topology, gradient) for topology in ("chain", "star") for gradient in ("all", "first")]


def small_llama(layers: int = LAYERS, **keys: Any) -> Any:
    """A random LLaMA whose logits are not flat."""
    torch.manual_seed(0)
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32, "initializer_range": 0.3}
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **sizes, "attn_implementation": "eager", **keys}))


def small_vit(**keys: Any) -> Any:
    torch.manual_seed(0)
    shape = {"image_size": 8, "patch_size": 4, "num_labels": 3, "initializer_range": 0.3, "num_attention_heads": 4}
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": LAYERS}
    return ViTForImageClassification(ViTConfig(**{**shape, **sizes, "attn_implementation": "eager", **keys}))


def stack(widths: tuple[int, int] = (7, 7), layers: int = LAYERS, bias: bool = True, dtype: Any = torch.float64) -> Any:
    """A user's own stack: layers of one linear and a nonlinearity."""
    torch.manual_seed(0)
    made = [nn.Sequential(nn.Linear(widths[0], widths[1], bias=bias, dtype=dtype), nn.Tanh()) for _ in range(layers)]
    return nn.Sequential(*made)


def shared(model: Any, layers: Any, seed: int = 1, **keys: Any) -> Any:
    """Make compounds, and give every increment a seeded value, so that layers differ."""
    generator = torch.Generator().manual_seed(seed)
    make_compounds(model, layers, VLoRAConfig(**{"rank": 2, "layers_per_compound": 2, **keys}), generator)
    fill(model, seed)
    return model


@torch.no_grad()
def fill(model: nn.Module, seed: int = 1, std: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = [value for name, value in model.named_parameters() if "increment_" in name]
    assert found
    for value in found:
        value.copy_(std * torch.randn(value.shape, generator=generator))


def twin_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name -> W of every shared linear, written out naively as a differentiable expression of the parameters."""
    found: dict[str, Tensor] = {}
    for name, layer in vlora_layers(model).items():
        weight = layer._base[0].weight
        if not layer.base_gradient:
            weight = weight.detach()
        for member in layer._members:
            up, down, row, column, diagonal = member.added()
            weight = weight if row is None else torch.diag(1 + row) @ weight
            weight = weight if column is None else weight @ torch.diag(1 + column)
            weight = weight + member.scale * (up @ down)
            if diagonal is not None:
                weight = weight + torch.zeros_like(weight).diagonal_scatter(diagonal)
        found[name] = weight
    assert found
    return found


def twin(model: nn.Module, *arguments: Any, **keys: Any) -> Any:
    """Run the model with every shared linear replaced by `linear(x, W, b)`, W from `twin_weights`, plain autograd."""
    weights, layers = twin_weights(model), vlora_layers(model)
    kept = {name: layer.forward for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.forward = _dense_forward(weights[name], layer.bias)  # type: ignore[assignment, method-assign]
        return model(*arguments, **keys)
    finally:
        for name in kept:
            del layers[name].__dict__["forward"]


def _dense_forward(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda x: nn.functional.linear(x, weight, bias)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def same(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4, atol: float = 1e-5) -> None:
    assert got.keys() == expected.keys() and got
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol, msg=partial("{}: {}".format, name))


@pytest.fixture(params=["llama", "vit"])
def family(request: pytest.FixtureRequest) -> Callable[[], tuple[Any, Any, dict[str, Tensor]]]:
    """Return what makes (model, its layers, its inputs) of a family in plain transformers."""

    def make() -> tuple[Any, Any, dict[str, Tensor]]:
        if request.param == "llama":
            model = small_llama()
            return model, model.model.layers, {"input_ids": IDS}
        model = small_vit()
        return model, model.vit.layers, {"pixel_values": IMAGES}

    return make
