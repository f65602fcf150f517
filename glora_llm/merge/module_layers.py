"""The layers of methods of our own beside GLoRA in a merge: one adapter may go into several modules of a block."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glora_llm.adapters.tuner import ModuleLayer
from glora_llm.errors import UserError

Part = tuple[ModuleLayer, str]


def parts_of(layers: Mapping[str, Any]) -> dict[str, Part]:
    """Return the frozen modules that adapters are merged into, by their full names: the layer, and the name inside it.

    Args:
        layers: of an adapter, by their names in the base model; those of PEFT and GLoRA are left out.
    """
    return {
        f"{name}.{inside}".rstrip("."): (layer, inside)
        for name, layer in layers.items()
        if isinstance(layer, ModuleLayer)
        for inside in layer.merges_into()
    }


@torch.no_grad()
def merged_part(name: str, part: Part, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return weight, outputs first, and bias (O) of a frozen module with the adapter in it, in float32.

    Raises:
        UserError: when a value is not finite.
    """
    layer, inside = part
    weight, bias = layer.merged_values(inside, layer.adapters(), weight, None if bias is None else bias.to(weight))
    if not all(value.isfinite().all() for value in (weight, bias) if value is not None):
        raise UserError(f"{name}: a merged value is not finite. The adapter seems to be broken.")
    return weight, bias


def with_real_norms(model: nn.Module) -> nn.Module:
    """Give norms and convolutions of a model on meta values of zero, so that adapters on them are real."""
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and not isinstance(module, nn.Embedding):
                zeros = torch.zeros(1).expand(parameter.shape) if parameter.dim() > 1 else torch.zeros(len(parameter))
                module._parameters[key] = nn.Parameter(zeros, requires_grad=False)
    return model
