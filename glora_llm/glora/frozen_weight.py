"""One accessor of W0: a dense view of the frozen weight of any linear, from fp, 4-bit or 8-bit, also under ZeRO 3."""

from typing import Any

import torch
from torch import Tensor, nn


def dense_weight(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """Return W0 of a linear as a dense (O, I) tensor.

    The W0 that a layer was trained with is the one in the dtype that it computed in: a 4-bit weight is dequantised to
    it, an int8 weight, which has no such dtype of its own, is dequantised in float32 and rounded to it once. The
    attribute is read through the module: under ZeRO 3 that gathers a partitioned weight, in forward and in backward.

    Args:
        layer: `nn.Linear`, or bitsandbytes' `Linear4bit` or `Linear8bitLt`.
        dtype: of the result; None keeps the weight's own (float32 of an int8 weight).

    Raises:
        TypeError: for a layer of another kind.
    """
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(layer).__name__} has no weight tensor; expected nn.Linear, Linear4bit or Linear8bitLt")
    if getattr(weight, "quant_state", None) is not None:
        dense = _dequantize_4bit(weight)
    elif weight.dtype == torch.int8:
        dense = _dequantize_8bit(layer)
    else:
        dense = weight.detach()
    return dense if dtype is None else dense.to(dtype)


def _dequantize_4bit(weight: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    dense: Tensor = dequantize_4bit(weight.detach(), weight.quant_state)
    return dense


def _dequantize_8bit(layer: Any) -> Tensor:
    """CB (O, I) is int8, SCB (O) the largest magnitude of each row; bitsandbytes moves them to `state` on first use."""
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight, state = layer.weight, getattr(layer, "state", None)
    scales = getattr(weight, "SCB", None)
    if scales is None and state is not None:
        scales = state.SCB
    if scales is None:
        raise TypeError(f"{type(layer).__name__} holds int8 values without their scales (SCB): load it by bitsandbytes")
    dense: Tensor = int8_vectorwise_dequant(weight.detach(), scales)
    return dense


def compute_dtype(layer: nn.Module) -> torch.dtype | None:
    """Return the dtype that the layer computes in: a dense weight's own, or what a 4-bit weight unpacks to.

    None for an int8 weight: such a layer computes in the dtype of its input.
    """
    weight: Any = layer.weight
    quant_state = getattr(weight, "quant_state", None)
    dtype: torch.dtype = weight.dtype if quant_state is None else quant_state.dtype
    return dtype if dtype.is_floating_point else None
