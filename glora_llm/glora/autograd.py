"""The two autograd functions of a GLoRA linear: forward and backward pass by hand, nothing of W0's size is kept.

Letters: T rows of x (tokens), O out_features, I in_features, r rank of A and B together, r_A that of A. Every thin
factor is stacked with its neighbours as *rows*, so a product with W0 or x reads aligned memory whatever the rank is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

ReadWeight = Callable[[], Tensor]
Scales = tuple[float, float]  # alpha / r of A and of B


class Inputs(NamedTuple):
    """The tensors that a layer computes with, and in the backward pass their gradients; None: there is none."""

    x: Tensor  # (T, I)
    dropped: Tensor | None = None  # (T, I), x after dropout: the input of the factors of A and B; None: x itself
    a_down: Tensor | None = None  # (I, r_A) product, (O, r_A) hadamard and block
    a_up: Tensor | None = None  # (r_A, I), (r_A, I/64) block
    b_down: Tensor | None = None  # (O, r_B)
    b_up: Tensor | None = None  # (r_B, I)
    gain: Tensor | None = None  # (O) or (1): A in mode vector or scalar
    shift: Tensor | None = None  # (O) or (1): B in mode vector or scalar
    c: Tensor | None = None  # (I)
    bias: Tensor | None = None  # (O): D b0 + E + b0

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Return the same tensors in `dtype`."""
        cast: list[Any] = [None if tensor is None else tensor.to(dtype) for tensor in self]
        return Inputs(*cast)


class _Kept(NamedTuple):
    """Tensors that the forward pass of `OnePass` saves for its backward pass."""

    x: Tensor  # (T, I)
    dropped: Tensor | None  # (T, I)
    thin: Tensor | None  # U = x [A_u; B_u]', (T, r)
    plain: Tensor | None  # x W0', (T, O)
    up: Tensor  # [A_u; B_u], (r, I)
    down: Tensor  # [(W0 A_d)'; B_d'], (r, O)
    gain: Tensor | None  # (O) or (1)
    shift: Tensor | None  # (O) or (1)


class OnePass(torch.autograd.Function):
    """y = (1 + a) * (x W0') + U [W0 A_d | B_d]' + sum(x) b' + W0 c + bias, with U = x [A_u; B_u]'.

    A in mode lora is the matrix product, whose gain a is zero then: W0 A_d A_u is a LoRA with the factor W0 A_d, so A
    and B together cost what one LoRA of rank r_A + r_B costs. W0 [A_d | c] is one thin product. What is kept is x, U
    and the stacked factors (and x W0' where a gain needs it).

    W0 [A_d | c] is formed anew in every pass. It could be kept between two optimizer steps, but nothing here would
    notice a step: ZeRO writes the parameters through `.data`, which leaves their versions and addresses as they were.
    """

    @staticmethod
    def forward(ctx: Any, read_weight: ReadWeight, scales: Scales, *tensors: Tensor | None) -> Tensor:
        """Return y, (T, O)."""
        s = Inputs(*tensors)  # type: ignore[arg-type]
        x, a_rank = s.x, _rank(s.a_up)
        common, own = _split(scales)
        weight = read_weight()
        up, through = _stack_of_inputs(s, x)
        products = through @ weight.t() if len(through) else through  # [(W0 A_d)'; (W0 c)'], (r_A + 1, O)
        down = _stack_of_outputs(products[:a_rank], s.b_down, own)
        bias = with_prompt(s.bias, None if s.c is None else products[-1])
        bias = None if bias is None else bias.to(x.dtype)
        gain, shift = (None if value is None else value.to(x.dtype) for value in (s.gain, s.shift))
        if gain is None:
            y, plain = linear(x, weight, bias), None
        else:
            plain = x @ weight.t()
            y = plain * (1 + gain)
            if bias is not None:
                y += bias
        thin = None
        if len(up):
            thin = (x if s.dropped is None else s.dropped) @ up.t()
            y.addmm_(thin, down, alpha=common)
        if shift is not None:
            y += x.sum(1, keepdim=True) * shift
        ctx.save_for_backward(*_Kept(x, s.dropped, thin, plain, up, down, gain, shift))
        ctx.read_weight, ctx.scales, ctx.a_rank = read_weight, scales, a_rank
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs; dy (T, O) is that of y."""
        kept, a_rank, wanted = _Kept(*ctx.saved_tensors), ctx.a_rank, Inputs(*ctx.needs_input_grad[2:])
        common, own = _split(ctx.scales)
        weight = ctx.read_weight()
        found: dict[str, Tensor | None] = {}
        through: list[Tensor] = []
        if kept.gain is not None and kept.plain is not None:
            # da = sum over rows of dy * (x W0'), (O)
            found["gain"] = reduce_like(kept.gain, dy * kept.plain)
        if kept.shift is not None:
            # db = sum over rows of dy * sum(x), (O)
            found["shift"] = reduce_like(kept.shift, dy * kept.x.sum(1, keepdim=True))
        dthin = None
        if kept.thin is not None:
            dthin = _scaled_mm(dy, kept.down.t(), common)  # dU = s dy [W0 A_d | B_d], (T, r)
            ddown = _scaled_mm(kept.thin.t(), dy, common)  # s U' dy, (r, O)
            # d[A_u; B_u] = dU' x, (r_A + r_B, I)
            dup = dthin.t() @ (kept.x if kept.dropped is None else kept.dropped)
            found["a_up"], found["b_up"] = dup[:a_rank], dup[a_rank:]
            # dB_d = s dy' U_B, (O, r_B)
            found["b_down"] = _times(ddown[a_rank:], own[1]).t()
            if a_rank:
                through.append(_times(ddown[:a_rank], own[0]))
        found["x"], found["dropped"] = _input_gradients(kept, weight, dy, dthin, wanted)
        if wanted.c or wanted.bias:
            # dbias = sum over rows of dy, (O)
            dbias = found["bias"] = dy.sum(0)
        if wanted.c:
            through.append(dbias[None])
        if through:
            # dA_d = W0' (s dy' U_A), (I, r_A), and dc = W0' dbias, (I), by one thin product
            products = _cat(through) @ weight
            found["a_down"], found["c"] = products[:a_rank].t(), products[-1]
        return None, None, *only_wanted(wanted, found)


def _input_gradients(
    kept: _Kept, weight: Tensor, dy: Tensor, dthin: Tensor | None, wanted: Inputs
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x and of x after dropout, (T, I); None where nobody wants it.

    dx = (dy (1 + a)) W0 + dU [A_u; B_u] + (dy . b) 1': its second term belongs to the dropped input where there is one.
    """
    dx = ddropped = None
    if wanted.x:
        dx = (dy if kept.gain is None else dy * (1 + kept.gain)) @ weight
        if kept.shift is not None:
            dx += (dy * kept.shift).sum(1, keepdim=True)
    if dthin is not None and kept.dropped is not None:
        ddropped = dthin @ kept.up
    elif dthin is not None and dx is not None:
        dx.addmm_(dthin, kept.up)
    return dx, ddropped


class Hadamard(torch.autograd.Function):
    """y = x W_eff' + W0 c + bias with W_eff = W0 + W0 * (A_d A_u) + B, formed once in forward, once in backward.

    There is no thin form: the factor gradients need dW = dy' x, a third product of full size.
    """

    @staticmethod
    def forward(ctx: Any, read_weight: ReadWeight, scales: Scales, *tensors: Tensor | None) -> Tensor:
        """Return y, (T, O)."""
        given = Inputs(*tensors)  # type: ignore[arg-type]
        s = given.to(given.x.dtype)
        weight = read_weight()
        delta = _hadamard_delta(weight, scales, s)
        bias = with_prompt(s.bias, None if s.c is None else torch.mv(weight, s.c))
        if s.dropped is None:
            y = linear(s.x, delta.add_(weight), bias)
        else:
            y = linear(s.x, weight, bias).addmm_(s.dropped, delta.t())
        if s.shift is not None:
            y += s.x.sum(1, keepdim=True) * s.shift
        ctx.save_for_backward(*s._replace(gain=None, c=None, bias=None))
        ctx.read_weight, ctx.scales = read_weight, scales
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs; dy (T, O) is that of y."""
        s, wanted = Inputs(*ctx.saved_tensors), Inputs(*ctx.needs_input_grad[2:])
        a_scale, b_scale = ctx.scales
        weight = ctx.read_weight()
        delta = _hadamard_delta(weight, ctx.scales, s)  # W_eff - W0, (O, I)
        dx, ddropped, dshift = _hadamard_input_gradients(s, weight, delta, dy)
        found: dict[str, Tensor | None] = {"x": dx, "dropped": ddropped, "shift": dshift}
        if wanted.c or wanted.bias:
            # dbias = sum over rows of dy, (O)
            dbias = found["bias"] = dy.sum(0)
        if wanted.c:
            # dc = W0' dbias, (I)
            found["c"] = torch.mv(weight.t(), dbias)
        dweight = dy.t() @ (s.x if s.dropped is None else s.dropped)  # (O, I)
        if s.b_down is not None and s.b_up is not None:
            # dB_d = s_B dW B_u', (O, r_B)
            found["b_down"] = b_scale * (dweight @ s.b_up.t())
            # dB_u = s_B B_d' dW, (r_B, I)
            found["b_up"] = b_scale * (s.b_down.t() @ dweight)
        assert s.a_down is not None and s.a_up is not None
        dproduct = dweight.mul_(weight)  # gradient of A_d A_u without its scale, (O, I)
        # dA_d = s_A (dW * W0) A_u', (O, r_A)
        found["a_down"] = a_scale * (dproduct @ s.a_up.t())
        # dA_u = s_A A_d' (dW * W0), (r_A, I)
        found["a_up"] = a_scale * (s.a_down.t() @ dproduct)
        return None, None, *only_wanted(wanted, found)


def _hadamard_input_gradients(
    s: Inputs, weight: Tensor, delta: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x, of x after dropout and of b. `delta` W_eff - W0 (O, I) is used up."""
    ddropped = dshift = None
    if s.dropped is None:
        # dx = dy W_eff + (dy . b) 1', (T, I)
        dx = dy @ delta.add_(weight)
    else:
        # dx = dy W0 + (dy . b) 1', and the gradient of the input after dropout is dy (W_eff - W0), (T, I)
        dx, ddropped = dy @ weight, dy @ delta
    if s.shift is not None:
        dx += (dy * s.shift).sum(1, keepdim=True)
        # db = sum over rows of dy * sum(x), (O)
        dshift = reduce_like(s.shift, dy * s.x.sum(1, keepdim=True))
    return dx, ddropped, dshift


def _hadamard_delta(weight: Tensor, scales: Scales, s: Inputs) -> Tensor:
    """Return s_A W0 * (A_d A_u) + s_B B_d B_u, (O, I)."""
    assert s.a_down is not None and s.a_up is not None
    a_scale, b_scale = scales
    delta = torch.mm(s.a_down, s.a_up).mul_(weight)
    if a_scale != 1:
        delta.mul_(a_scale)
    if s.b_down is not None and s.b_up is not None:
        delta.addmm_(s.b_down, s.b_up, alpha=b_scale)
    return delta


def _stack_of_inputs(s: Inputs, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return [A_u; B_u], (r_A + r_B, I), and [A_d'; c'], (r_A + 1, I), in x's dtype.

    All that has I columns is copied (and cast) by one kernel.
    """
    down = None if s.a_down is None else s.a_down.t()
    column = None if s.c is None else s.c[None]
    present = [part for part in (s.a_up, s.b_up, down, column) if part is not None]
    stacked = _cat(present).to(x.dtype) if present else x.new_empty(0, x.shape[1])
    rank = _rank(s.a_up) + _rank(s.b_up)
    return stacked[:rank], stacked[rank:]


def _stack_of_outputs(through: Tensor, b_down: Tensor | None, own: Scales) -> Tensor:
    """Return [(W0 A_d)'; B_d'], (r_A + r_B, O), each times its own part of the scale."""
    if b_down is None:
        return _times(through, own[0])
    shift = _times(b_down.t().to(through.dtype), own[1])
    return _cat([_times(through, own[0]), shift]) if len(through) else shift


def _split(scales: Scales) -> tuple[float, Scales]:
    """Return what scales A and B both (a product of matrices takes it along), and what is left for each."""
    return (scales[0], (1.0, 1.0)) if scales[0] == scales[1] else (1.0, scales)


def _times(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else scale * tensor


def _scaled_mm(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return scale * left @ right in one kernel."""
    if scale == 1:
        return left @ right
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _cat(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _rank(up: Tensor | None) -> int:
    return 0 if up is None else up.shape[0]


def only_wanted(wanted: Inputs, found: dict[str, Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return the gradients in the order of the inputs, None where none is wanted."""
    return tuple(found.get(name) if want else None for name, want in wanted._asdict().items())


def with_prompt(bias: Tensor | None, prompt: Tensor | None) -> Tensor | None:
    """Return bias + W0 c, (O): what W0 makes of a constant input is itself a bias."""
    if prompt is None:
        return bias
    return prompt if bias is None else bias + prompt


def reduce_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Sum a (T, O) gradient to the parameter's shape: (O) for a vector, (1) for a scalar."""
    return gradient.sum(0) if parameter.numel() > 1 else gradient.sum().reshape(1)
