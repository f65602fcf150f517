"""One accessor of W0: a dense view of the frozen weight of any linear, from fp, 4-bit or 8-bit, also under ZeRO 3."""

import torch
from torch import Tensor, nn


def dense_weight(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """Return W0 of a linear as a dense (O, I) tensor.

    A quantised weight is dequantised to the dtype that it was trained in, so this is exactly the W0 of training. The
    attribute is read through the module: under ZeRO 3 that gathers a partitioned weight, in forward and in backward.

    Args:
        layer: `nn.Linear`, or bitsandbytes' `Linear4bit` or `Linear8bitLt`.
        dtype: of the result; None keeps the weight's own.

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


def _dequantize_4bit(weight: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.detach(), weight.quant_state)


def _dequantize_8bit(layer: nn.Module) -> Tensor:
    """CB is (O, I) int8, SCB (O) holds the largest magnitude of each row; bitsandbytes moves them to `state` on use."""
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight, state = layer.weight, getattr(layer, "state", None)
    scales = getattr(weight, "SCB", None)
    if scales is None and state is not None:
        scales = state.SCB
    if scales is None:
        raise TypeError(f"{type(layer).__name__} holds int8 values without their scales (SCB): load it by bitsandbytes")
    return int8_vectorwise_dequant(weight.detach(), scales)


def compute_dtype(layer: nn.Module) -> torch.dtype:
    """Return the dtype in which the layer computes: of a dense weight its own, of a quantised one what it unpacks to."""
    quant_state = getattr(layer.weight, "quant_state", None)
    if quant_state is not None:
        return quant_state.dtype
    return layer.weight.dtype if layer.weight.is_floating_point() else torch.get_default_dtype()
