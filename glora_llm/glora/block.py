"""The autograd function of a linear whose slot A has mode block: one gain for each block of 64 values of W0.

Letters: T rows of x (tokens), O out_features, I in_features, r rank, K = I/64 blocks in a row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from glora_llm.glora.autograd import Inputs, Scales, only_wanted, reduce_like, with_prompt
from glora_llm.schema.slots import BLOCK


class FrozenWeight(NamedTuple):
    """The three ways in which the function reads a frozen W0, (O, I)."""

    read: Callable[[], Tensor]  # W0
    scale: Callable[[Tensor], Tensor]  # factors (O, K), float32 -> W0 times the factor of each block
    times: Callable[[Tensor], Tensor]  # c (I) -> W0 c, (O)


def scaled_by_block(weight: Tensor, factors: Tensor) -> Tensor:
    """Return W0 (O, I) with each block of 64 values of a row times its factor (O, K), rounded once to W0's dtype."""
    blocks = weight.unflatten(1, (factors.shape[1], BLOCK))
    return (blocks * factors[..., None]).to(weight.dtype).flatten(1)


def frozen_of(read_weight: Callable[[], Tensor]) -> FrozenWeight:
    """Return the ways to read a W0 that is there as a dense matrix."""
    return FrozenWeight(
        read_weight, lambda factors: scaled_by_block(read_weight(), factors), lambda c: torch.mv(read_weight(), c)
    )


class Block(torch.autograd.Function):
    """y = x W_s' + s_B U B_d' + sum(x) b' + W0 c + bias, with U = x B_u' and W_s = W0 * (1 + G) by blocks.

    G = s_A A_d A_u, (O, K), is formed anew in each pass: nothing as large as W0 is kept, nor G. A 4-bit W0 is
    unpacked once in the forward pass, with its scales times 1 + G: the weight of the merged 4-bit model, bit for bit.
    W0 c is one thin pass more, which `times` forms from the 4-bit codes. The backward pass needs W_s (for dx) and W0
    (for dG and dc), one after the other, and dW = dy' x, a third product of full size, as in `Hadamard`.
    """

    @staticmethod
    def forward(ctx: Any, frozen: FrozenWeight, scales: Scales, *tensors: Tensor | None) -> Tensor:
        """Return y, (T, O)."""
        given = Inputs(*tensors)  # type: ignore[arg-type]
        s = given.to(given.x.dtype)._replace(a_down=given.a_down, a_up=given.a_up)
        bias = with_prompt(s.bias, None if s.c is None else frozen.times(s.c))
        y = linear(s.x, frozen.scale(_factors(s, scales[0])), bias)
        thin = None
        if s.b_down is not None and s.b_up is not None:
            thin = (s.x if s.dropped is None else s.dropped) @ s.b_up.t()
            y.addmm_(thin, s.b_down.t(), alpha=scales[1])
        if s.shift is not None:
            y += s.x.sum(1, keepdim=True) * s.shift
        ctx.save_for_backward(thin, *s._replace(c=None, bias=None))
        ctx.frozen, ctx.scales = frozen, scales
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs; dy (T, O) is that of y."""
        thin, *kept = ctx.saved_tensors
        s, wanted = Inputs(*kept), Inputs(*ctx.needs_input_grad[2:])
        a_scale, b_scale = ctx.scales
        found: dict[str, Tensor | None] = {}
        if wanted.x:
            # dx = dy W_s, (T, I)
            dx = found["x"] = dy @ ctx.frozen.scale(_factors(s, a_scale))
            if s.shift is not None:
                dx += (dy * s.shift).sum(1, keepdim=True)
        if s.shift is not None:
            # db = sum over rows of dy * sum(x), (O)
            found["shift"] = reduce_like(s.shift, dy * s.x.sum(1, keepdim=True))
        if thin is not None and s.b_down is not None and s.b_up is not None:
            dthin = b_scale * (dy @ s.b_down)  # dU, (T, r_B)
            found["b_down"] = b_scale * (dy.t() @ thin)
            found["b_up"] = dthin.t() @ (s.x if s.dropped is None else s.dropped)
            if s.dropped is not None:
                found["dropped"] = dthin @ s.b_up
            elif wanted.x:
                dx.addmm_(dthin, s.b_up)
        if wanted.c or wanted.bias:
            # dbias = sum over rows of dy, (O)
            dbias = found["bias"] = dy.sum(0)
        weight = ctx.frozen.read()
        if wanted.c:
            # dc = W0' dbias, (I)
            found["c"] = torch.mv(weight.t(), dbias)
        assert s.a_down is not None and s.a_up is not None
        # dG = sum over each block of dW * W0, (O, K)
        dweight = (dy.t() @ s.x).mul_(weight)
        dgain = dweight.unflatten(1, (-1, BLOCK)).sum(2, dtype=_dtype(s.a_down))
        # dA_d = s_A dG A_u', (O, r_A), and dA_u = s_A A_d' dG, (r_A, K)
        found["a_down"] = a_scale * (dgain @ s.a_up.t().to(dgain.dtype))
        found["a_up"] = a_scale * (s.a_down.t().to(dgain.dtype) @ dgain)
        return None, None, *only_wanted(wanted, found)


def _factors(s: Inputs, scale: float) -> Tensor:
    """Return 1 + s_A A_d A_u, (O, K), in float32 whatever the model computes in."""
    assert s.a_down is not None and s.a_up is not None
    return block_factors(s.a_down, s.a_up, scale)


def block_factors(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return 1 + scale * down @ up, (O, K), in float32 (float64 of float64 factors).

    Args:
        down: (O, r).
        up: (r, K).
        scale: alpha / r.
    """
    dtype = _dtype(down)
    return 1 + scale * (down.to(dtype) @ up.to(dtype))


def _dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
