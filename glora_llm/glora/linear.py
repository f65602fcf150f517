"""The GLoRA linear, f(x) = (W0 + W0 A + B) x + W0 C + D b0 + E + b0, in one pass over a frozen W0.

Source: arXiv 2306.07967, equation 3. Letters: T rows of x (tokens), O out_features, I in_features, r rank.
`effective` is the formula as written; the three autograd functions compute the same without keeping anything of the
size of W0 for the backward pass (a quantised W0 is dequantised once in forward and once in backward).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_llm.glora.autograd import Hadamard, Inputs, OnePass, ReadWeight, with_prompt
from glora_llm.glora.block import Block, FrozenWeight, block_factors, frozen_of, scaled_by_block


class Slots(NamedTuple):
    """The values of one layer's slots; None is mode none. Scales (alpha / r) are plain numbers."""

    a_down: Tensor | None = None  # (I, r) product, (O, r) hadamard and block
    a_up: Tensor | None = None  # (r, I)
    a_blocks: Tensor | None = None  # (r, I/64): in place of a_up in mode block
    a_scale: float = 1.0
    a_gain: Tensor | None = None  # (O) vector, (1) scalar
    b_down: Tensor | None = None  # (O, r)
    b_up: Tensor | None = None  # (r, I)
    b_scale: float = 1.0
    b_shift: Tensor | None = None  # (O) vector, (1) scalar
    c: Tensor | None = None  # (I), of either mode
    d: Tensor | None = None  # (O) vector, (1) scalar
    e: Tensor | None = None  # (O) vector, (1) scalar

    def to(self, dtype: torch.dtype) -> "Slots":
        """Return the same slots with every tensor in `dtype`."""
        tensors: dict[str, Any] = {n: v.to(dtype) for n, v in self._asdict().items() if isinstance(v, Tensor)}
        return self._replace(**tensors)


def effective(w0: Tensor, b0: Tensor | None, s: Slots, composition: str) -> tuple[Tensor, Tensor | None]:
    """Return the weight (O, I) and bias (O) that the layer computes with: the formula itself. Merging uses this.

    Args:
        w0: the frozen weight, (O, I). W0 C is of this original weight, whatever A does.
        b0: the frozen bias (O), or None; D acts on it alone.
        composition: `product` (W0 A with A = A_d A_u, a matrix product) or `hadamard` (W0 * (A_d A_u)).
    """
    weight = w0.clone()
    if s.a_down is not None and s.a_up is not None:
        if composition == "product":
            weight += s.a_scale * (w0 @ s.a_down) @ s.a_up
        else:
            weight += s.a_scale * w0 * (s.a_down @ s.a_up)
    if s.a_down is not None and s.a_blocks is not None:
        weight = scaled_by_block(w0, block_factors(s.a_down, s.a_blocks, s.a_scale))
    if s.a_gain is not None:
        weight += s.a_gain[:, None] * w0
    if s.b_down is not None and s.b_up is not None:
        weight += s.b_scale * (s.b_down @ s.b_up)
    if s.b_shift is not None:
        weight += s.b_shift[:, None]
    bias = frozen_and_shifted_bias(b0, s, w0.shape[0])
    return weight, with_prompt(bias, None if s.c is None else w0 @ s.c)


def frozen_and_shifted_bias(b0: Tensor | None, s: Slots, out_features: int) -> Tensor | None:
    """Return D b0 + E + b0, (O), or None where nothing is there."""
    bias = b0
    if b0 is not None and s.d is not None:
        bias = b0 + s.d * b0
    if s.e is not None:
        bias = s.e.expand(out_features) if bias is None else bias + s.e
    return bias


def glora_linear(
    x: Tensor,
    read_weight: ReadWeight,
    out_features: int,
    b0: Tensor | None,
    s: Slots,
    composition: str,
    dropped: Tensor | None = None,
    frozen: FrozenWeight | None = None,
) -> Tensor:
    """Compute f(x) without forming anything of W0's size that outlives the call.

    Args:
        x: (..., I).
        read_weight: returns W0 (O, I) in x's dtype; called once in forward and once in backward.
        b0: the frozen bias (O), or None.
        dropped: x after dropout, (..., I): the input of the low-rank factors of A and B. None: x itself.
        frozen: how A in mode block reads W0; None: by `read_weight`.

    Returns:
        (..., O), in x's dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    thin_rows = None if dropped is None else dropped.reshape(rows.shape)
    bias = frozen_and_shifted_bias(b0, s, out_features)
    a_up = s.a_up if s.a_blocks is None else s.a_blocks
    tensors = Inputs(rows, thin_rows, s.a_down, a_up, s.b_down, s.b_up, s.a_gain, s.b_shift, s.c, bias)
    if s.a_blocks is not None:
        frozen = frozen or frozen_of(read_weight)
        by_blocks: Tensor = Block.apply(frozen, (s.a_scale, s.b_scale), *tensors)
        return by_blocks.reshape(*x.shape[:-1], out_features)
    function = Hadamard if composition == "hadamard" and s.a_down is not None else OnePass
    a_scale = s.b_scale if s.a_down is None else s.a_scale  # a slot that is not there takes the other's
    b_scale = s.a_scale if s.b_down is None else s.b_scale
    y: Tensor = function.apply(read_weight, (a_scale, b_scale), *tensors)
    return y.reshape(*x.shape[:-1], out_features)
