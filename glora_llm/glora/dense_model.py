"""A merged model as plain transformers can load it: dense linears, and only biases that its configuration describes."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from glora_llm.glora.frozen_weight import compute_dtype
from glora_llm.models.bias import switch_biases_on
from glora_llm.models.matrices import CONVOLUTIONS, LINEARS, matrix_shape

NAMED = 5  # layers that a warning lists


def dense_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """Return a frozen `nn.Linear` that holds weight (O, I) and bias (O) in `dtype`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return linear


def complete(model: nn.Module) -> None:
    """Make a merged model and its configuration agree, so that it can be saved and loaded by plain transformers.

    Switches for biases are turned on and linears that have none then get zeros; the marks of a quantised model go.
    Biases that the family cannot hold are warned about.
    """
    from transformers import PreTrainedModel

    kinds = LINEARS + CONVOLUTIONS
    linears: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    if isinstance(model, PreTrainedModel):
        _describe_biases(model, linears)
    if all(type(module) in kinds or not isinstance(module, nn.Linear) for module in linears.values()):
        _drop_quantisation_marks(model, getattr(model, "config", None))


def _describe_biases(model: Any, linears: dict[str, Any]) -> None:
    biased = {name for name, module in linears.items() if module.bias is not None}
    described = switch_biases_on(type(model), model.config, biased)
    for name in described - biased:
        module = linears[name]
        dtype = compute_dtype(module) or model.dtype
        zeros = torch.zeros(matrix_shape(module)[0], dtype=dtype, device=module.weight.device)
        module.bias = nn.Parameter(zeros, requires_grad=False)
    lost = sorted(biased - described)
    if lost:
        more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
        warnings.warn(
            f"The merged model has biases in {len(lost)} linears, where a {model.config.model_type} model of plain "
            f"transformers has none: {', '.join(lost[:NAMED])}{more}. Saved and loaded again, it would lose them. "
            "Keep the adapter unmerged (save it by PEFT's save_pretrained), or train these layers "
            "without slots C and E.",
            stacklevel=5,  # the caller of merge_and_unload
        )


def _drop_quantisation_marks(model: nn.Module, config: Any) -> None:
    for mark in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method"):
        if mark in model.__dict__:
            delattr(model, mark)
    if config is not None and getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
