"""The GLoRA linear, f(x) = (W0 + W0 A + B) x + W0 C + D b0 + E + b0, in one pass over a frozen W0.

Source: arXiv 2306.07967, equation 3. Letters: T rows of x (tokens), O out_features, I in_features, r rank.
`effective` is the formula as written; the two autograd functions compute the same without keeping anything of the
size of W0 for the backward pass (a quantised W0 is dequantised once in forward and once in backward).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ReadWeight = Callable[[], Tensor]
Scales = tuple[float, float]  # alpha / r of A and of B


class Slots(NamedTuple):
    """The values of one layer's slots; None is mode none. Scales (alpha / r) are plain numbers."""

    a_down: Tensor | None = None  # (I, r) product, (O, r) hadamard
    a_up: Tensor | None = None  # (r, I)
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
    if s.a_gain is not None:
        weight += s.a_gain[:, None] * w0
    if s.b_down is not None and s.b_up is not None:
        weight += s.b_scale * (s.b_down @ s.b_up)
    if s.b_shift is not None:
        weight += s.b_shift[:, None]
    bias = frozen_and_shifted_bias(b0, s, w0.shape[0])
    return weight, _plus(bias, None if s.c is None else w0 @ s.c)


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
) -> Tensor:
    """Compute f(x) without forming anything of W0's size that outlives the call.

    Args:
        x: (..., I).
        read_weight: returns W0 (O, I) in x's dtype; called once in forward and once in backward.
        b0: the frozen bias (O), or None.
        dropped: x after dropout, (..., I): the input of the low-rank factors of A and B. None: x itself.

    Returns:
        (..., O), in x's dtype.
    """
    s = s.to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    thin_rows = None if dropped is None else dropped.reshape(rows.shape)
    bias = frozen_and_shifted_bias(None if b0 is None else b0.to(x.dtype), s, out_features)
    function = _Hadamard if composition == "hadamard" and s.a_down is not None else _OnePass
    tensors = (rows, thin_rows, s.a_down, s.a_up, s.b_down, s.b_up, s.a_gain, s.b_shift, s.c, bias)
    y: Tensor = function.apply(read_weight, (s.a_scale, s.b_scale), *tensors)
    return y.reshape(*x.shape[:-1], out_features)


class _OnePass(torch.autograd.Function):
    """y = (1 + a) * (x W0') + U [W0 A_d | B_d]' + sum(x) b' + W0 c + bias, with U = x [A_u; B_u]'.

    A in mode lora is the matrix product, whose gain a is zero then: W0 A_d A_u is a LoRA with the factor W0 A_d, so A
    and B together cost what one LoRA of rank r_A + r_B costs. W0 [A_d | c] is one thin product. What is kept is x, U
    and W0 A_d (and x W0' where a gain needs it).
    """

    @staticmethod
    def forward(ctx: Any, read_weight: ReadWeight, scales: Scales, *tensors: Tensor | None) -> Tensor:
        x, dropped, a_down, a_up, b_down, b_up, gain, shift, c, bias = tensors
        assert x is not None
        weight = read_weight()
        thin = _thin(x if dropped is None else dropped, a_up, b_up)
        through, prompt = _through_weight(weight, a_down, c)
        down = stack_downs(through, b_down, scales)
        full_bias = _plus(bias, prompt)
        if gain is None:
            y, plain = torch.nn.functional.linear(x, weight, full_bias), None
        else:
            plain = x @ weight.t()
            y = plain * (1 + gain)
            if full_bias is not None:
                y += full_bias
        if down is not None:
            y.addmm_(thin, down.t())
        if shift is not None:
            y += x.sum(1, keepdim=True) * shift
        ctx.save_for_backward(x, dropped, thin, plain, down, a_up, b_up, gain, shift)
        ctx.read_weight, ctx.scales = read_weight, scales
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, dropped, thin, plain, down, a_up, b_up, gain, shift = ctx.saved_tensors
        a_scale, b_scale = ctx.scales
        r = 0 if a_up is None else a_up.shape[0]
        weight = ctx.read_weight()
        prompt_total, dbias = _bias_gradients(ctx, dy)
        dgain = None if gain is None else _reduce_like(gain, dy * plain)
        dx = (dy if gain is None else dy * (1 + gain)) @ weight
        dshift = da_up = db_up = ddropped = dthrough = db_down = None
        if shift is not None:
            dshift = _reduce_like(shift, dy * x.sum(1, keepdim=True))
            dx = dx + (dy * shift).sum(1, keepdim=True)
        if down is not None:
            ddown, dthin, up = dy.t() @ thin, dy @ down, stack_ups(a_up, b_up)
            dup = dthin.t() @ (x if dropped is None else dropped)
            if a_up is not None:
                dthrough, da_up = a_scale * ddown[:, :r], dup[:r]
            if b_up is not None:
                db_down, db_up = b_scale * ddown[:, r:], dup[r:]
            if dropped is None:
                dx.addmm_(dthin, up)
            else:
                ddropped = dthin @ up
        da_down, dc = _through_weight(weight.t(), dthrough, prompt_total)
        return None, None, dx, ddropped, da_down, da_up, db_down, db_up, dgain, dshift, dc, dbias


class _Hadamard(torch.autograd.Function):
    """y = x W_eff' + W0 c + bias with W_eff = W0 + W0 * (A_d A_u) + B, formed once in forward, once in backward.

    There is no thin form: the factor gradients need dW = dy' x, a third product of full size.
    """

    @staticmethod
    def forward(ctx: Any, read_weight: ReadWeight, scales: Scales, *tensors: Tensor | None) -> Tensor:
        x, dropped, a_down, a_up, b_down, b_up, _gain, shift, c, bias = tensors
        assert x is not None and a_down is not None and a_up is not None
        weight = read_weight()
        delta = _hadamard_delta(weight, scales, a_down, a_up, b_down, b_up)
        full_bias = _plus(bias, _through_weight(weight, None, c)[1])
        if dropped is None:
            y = torch.nn.functional.linear(x, delta.add_(weight), full_bias)
        else:
            y = torch.nn.functional.linear(x, weight, full_bias).addmm_(dropped, delta.t())
        if shift is not None:
            y += x.sum(1, keepdim=True) * shift
        ctx.save_for_backward(x, dropped, a_down, a_up, b_down, b_up, shift)
        ctx.read_weight, ctx.scales = read_weight, scales
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, dropped, a_down, a_up, b_down, b_up, shift = ctx.saved_tensors
        a_scale, b_scale = ctx.scales
        weight = ctx.read_weight()
        prompt_total, dbias = _bias_gradients(ctx, dy)
        _, dc = _through_weight(weight.t(), None, prompt_total)
        delta = _hadamard_delta(weight, ctx.scales, a_down, a_up, b_down, b_up)
        if dropped is None:
            dx, ddropped = dy @ delta.add_(weight), None
        else:
            dx, ddropped = dy @ weight, dy @ delta
        dweight = dy.t() @ (x if dropped is None else dropped)
        dshift = None
        if shift is not None:
            dshift = _reduce_like(shift, dy * x.sum(1, keepdim=True))
            dx = dx + (dy * shift).sum(1, keepdim=True)
        db_down = db_up = None
        if b_down is not None:
            db_down, db_up = b_scale * (dweight @ b_up.t()), b_scale * (b_down.t() @ dweight)
        dproduct = dweight.mul_(weight)
        da_down, da_up = a_scale * (dproduct @ a_up.t()), a_scale * (a_down.t() @ dproduct)
        return None, None, dx, ddropped, da_down, da_up, db_down, db_up, None, dshift, dc, dbias


def _hadamard_delta(
    weight: Tensor,
    scales: Scales,
    a_down: Tensor,
    a_up: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
) -> Tensor:
    a_scale, b_scale = scales
    delta = torch.mm(a_down, a_up).mul_(weight)
    if a_scale != 1:
        delta.mul_(a_scale)
    if b_down is not None and b_up is not None:
        delta.addmm_(b_down, b_up, alpha=b_scale)
    return delta


def _thin(x: Tensor, a_up: Tensor | None, b_up: Tensor | None) -> Tensor:
    """Return U = x [A_u; B_u]', (T, r_A + r_B); (T, 0) where neither slot is low-rank."""
    if a_up is None and b_up is None:
        return x.new_empty(x.shape[0], 0)
    return x @ stack_ups(a_up, b_up).t()


def _bias_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return what c sees before W0', and dbias: both the sum over rows, None where it is not wanted."""
    wants_c, wants_bias = ctx.needs_input_grad[-2:]
    total = dy.sum(0) if wants_c or wants_bias else None
    return (total if wants_c else None), (total if wants_bias else None)


def _through_weight(
    weight: Tensor, factor: Tensor | None, column: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return (weight @ factor, weight @ column) by one product; None where there is none."""
    if factor is None:
        return None, None if column is None else torch.mv(weight, column)
    if column is None:
        return weight @ factor, None
    both = weight @ torch.cat([factor, column[:, None]], 1)
    return both[:, :-1], both[:, -1]


def stack_downs(through: Tensor | None, b_down: Tensor | None, scales: Scales) -> Tensor | None:
    """Return [s_A W0 A_d | s_B B_d], (O, r_A + r_B), or None where neither slot is low-rank."""
    factors = [s * f for s, f in zip(scales, (through, b_down), strict=True) if f is not None]
    return torch.cat(factors, 1) if factors else None


def stack_ups(a_up: Tensor | None, b_up: Tensor | None) -> Tensor:
    """Return [A_u; B_u], (r_A + r_B, I); at least one is given."""
    present = [up for up in (a_up, b_up) if up is not None]
    return present[0] if len(present) == 1 else torch.cat(present)


def _plus(bias: Tensor | None, prompt: Tensor | None) -> Tensor | None:
    """Return bias + W0 c: what W0 makes of a constant input is itself a bias."""
    if prompt is None:
        return bias
    return prompt if bias is None else bias + prompt


def _reduce_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Sum a (rows, O) gradient to the parameter's shape: (O) for a vector, (1) for a scalar."""
    return gradient.sum(0) if parameter.numel() > 1 else gradient.sum().reshape(1)
