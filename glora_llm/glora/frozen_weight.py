"""One accessor of W0: a dense view of the frozen weight of any layer, from fp, 4-bit or 8-bit, also under ZeRO 3."""

from typing import Any

import torch
from torch import Tensor, nn

from glora_llm.glora.block import FrozenWeight, scaled_by_block
from glora_llm.models.matrices import as_matrix
from glora_llm.schema.slots import BLOCK


def dense_weight(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """Return W0 of a layer as a dense (O, I) tensor.

    The W0 that a layer was trained with is the one in the dtype that it computed in: a 4-bit weight is dequantised to
    it, an int8 weight, which has no such dtype of its own, is dequantised in float32 and rounded to it once. The
    attribute is read through the module: under ZeRO 3 that gathers a partitioned weight, in forward and in backward.

    Args:
        layer: one of `models.matrices`, or bitsandbytes' `Linear4bit` or `Linear8bitLt`.
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
        if type(layer) is not nn.Linear:
            dense = as_matrix(layer, dense)
    return dense if dtype is None else dense.to(dtype)


def _dequantize_4bit(weight: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    dense: Tensor = dequantize_4bit(weight.detach(), weight.quant_state)
    return dense


def block_scales(weight: Any) -> Tensor:
    """Return the scales (absmax) of a 4-bit weight, (O, I/64) in float32, the quantisation of the scales undone.

    Args:
        weight: of bitsandbytes' `Linear4bit`, quantised in blocks of 64 where 64 divides I.
    """
    from bitsandbytes.functional import dequantize_blockwise

    state = weight.quant_state
    scales: Tensor = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    return scales.float().view(state.shape[0], -1)


def unpack(weight: Any, scales: Tensor) -> Tensor:
    """Return a 4-bit weight with other block scales (O, I/64) as a dense matrix (O, I), in its own dtype."""
    state = weight.quant_state
    dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        weight.detach(), scales.reshape(-1), state.blocksize, state.quant_type, state.shape, state.dtype
    )
    return dense


def has_block_scales(weight: Any) -> bool:
    """Tell whether a weight is in 4 bits, with one scale for each block of 64 values along a row."""
    state = getattr(weight, "quant_state", None)
    return state is not None and state.blocksize == BLOCK and state.shape[1] % BLOCK == 0


def frozen_weight(layer: nn.Module, dtype: torch.dtype) -> FrozenWeight:
    """Return the ways in which A in mode block reads the frozen weight of a linear, in `dtype`.

    Args:
        layer: as in `dense_weight`.
    """

    def scale(factors: Tensor) -> Tensor:
        weight: Any = layer.weight
        if has_block_scales(weight):
            return unpack(weight, block_scales(weight) * factors).to(dtype)
        return scaled_by_block(dense_weight(layer, dtype), factors)

    def times(c: Tensor) -> Tensor:
        weight: Any = layer.weight
        if has_block_scales(weight):
            from bitsandbytes import matmul_4bit

            product: Tensor = matmul_4bit(c[None], weight.detach(), quant_state=weight.quant_state)
            return product[0]
        return torch.mv(dense_weight(layer, dtype), c)

    return FrozenWeight(lambda: dense_weight(layer, dtype), scale, times)


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
