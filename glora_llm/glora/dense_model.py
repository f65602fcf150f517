"""What a merged model must be for plain transformers: dense linears, and biases that its config knows."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# LLaMA-style configs switch the biases of a whole group of linears at once.
BIAS_SWITCHES: dict[str, tuple[str, ...]] = {
    "attention_bias": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp_bias": ("gate_proj", "up_proj", "down_proj"),
}


def dense_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """Return a frozen `nn.Linear` that holds weight (O, I) and bias (O) in `dtype`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return linear


def switches_for(names_with_bias: Iterable[str]) -> set[str]:
    """Return the config switches that must be on for linears (full names or last parts) that carry a bias."""
    last = {name.rpartition(".")[2] for name in names_with_bias}
    return {switch for switch, group in BIAS_SWITCHES.items() if last & set(group)}


def complete(model: nn.Module) -> None:
    """Make a merged model consistent: bias switches on, zeros where a switched-on layer has none, no quantisation mark.

    A config without the switch cannot describe the merged biases: that is warned about.
    """
    config: Any = getattr(model, "config", None)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    dense = [module for module in linears.values() if type(module) is nn.Linear]
    biased = [name for name, module in linears.items() if module.bias is not None]
    for switch in switches_for(biased) if config is not None else ():
        if not hasattr(config, switch):
            _warn_unless_native(config, switch)
            continue
        setattr(config, switch, True)
        _fill_with_zeros(linears, BIAS_SWITCHES[switch])
    if len(dense) == len(linears):
        _drop_quantisation_marks(model, config)


def _fill_with_zeros(linears: dict[str, nn.Linear], group: tuple[str, ...]) -> None:
    for name, module in linears.items():
        if name.rpartition(".")[2] in group and module.bias is None:
            dtype = module.weight.dtype if module.weight.is_floating_point() else torch.get_default_dtype()
            zeros = torch.zeros(module.out_features, dtype=dtype, device=module.weight.device)
            module.bias = nn.Parameter(zeros, requires_grad=False)


def _warn_unless_native(config: Any, switch: str) -> None:
    if config.model_type != "qwen2":
        warnings.warn(
            f"The merged model has biases, and a {config.model_type} config has no '{switch}': plain transformers "
            "would drop them on loading. Use slots A and B only (C and E none) for a mergeable adapter.",
            stacklevel=3,
        )


def _drop_quantisation_marks(model: nn.Module, config: Any) -> None:
    for mark in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method"):
        if mark in model.__dict__:
            delattr(model, mark)
    if config is not None and getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
