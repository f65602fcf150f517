"""The VLoRA linear of a layer that shares its compound's base: y = x W' + b, W of `weight.Parts`.

Source: arXiv 2406.09315; W = W_base + s sum_j B_j A_j, in a chain the sum over the layers 2..l, in a star one term;
gains and a diagonal as in `weight`. Letters: T rows of x (tokens), O out_features, I in_features, r rank, R the sum of
the ranks (chain: (l - 1) r).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glora_llm.vlora.weight import Parts, compose


class CallSettings(NamedTuple):
    """The settings of one call.

    Args:
        base: W_base (O, I), which is read whether or not it gets a gradient from this layer.
        scale: s.
        composed: form W (O, I) rather than two thin products beside x W_base'.
        dtype: of the computation; parameters keep theirs.
    """

    base: Tensor
    scale: float
    composed: bool
    dtype: torch.dtype


def is_composed_cheaper(rows: int, out_features: int, in_features: int, increments_alone: bool = False) -> bool:
    """Tell whether forming W costs fewer operations than the thin products.

    Beside what a dense linear does, with n = O I and w = O + I: composed 2 n R forward, 2 n R for dx and 4 n R for the
    increments' gradients from dW; thin 2 T R w, 2 T R w and 2 T R w (its dx and gradients share dy B). The first two
    decide: composed is cheaper from T = O I / (O + I) rows on, half the width of a square matrix. R, and with it
    rank, topology and the place in the chain, cancel. Where only the increments are trained, dW is not formed and
    both take their gradients thin, for which composed lacks U and dy B: it needs twice the rows.

    Args:
        rows: T.
        increments_alone: whether increments want a gradient from this layer and the base does not.
    """
    return out_features * in_features * (2 if increments_alone else 1) < rows * (out_features + in_features)


def is_full_gradient_cheaper(rows: int, out_features: int, in_features: int, rank: int) -> bool:
    """Tell whether the increments' gradients cost fewer operations through dW = dy' x, where the base wants none.

    Through dW: 2 T O I + 4 O I R; thin: 4 T R (O + I). R = rank is that of all increments together.
    """
    full, width = out_features * in_features, out_features + in_features
    return rows * full + 2 * full * rank < 2 * rows * rank * width


def vlora_linear(
    x: Tensor, parts: Parts, bias: Tensor | None, scale: float, base_gradient: bool = True, form: str = "auto"
) -> Tensor:
    """Compute y = x W' + b with exact gradients; nothing of size (O, I) but the base itself is kept for backward.

    W is formed again in backward, and dW = dy' x is formed once and freed at once: the base gets it, added in place
    to what the other layers gave, and every increment its thin share, dB_j = s dW A_j', dA_j = s B_j' dW. So one
    weight and one gradient a matrix are live at a time, as in a dense linear. In bfloat16 the composed W is rounded
    as a dense weight would be; under autocast it is composed in the parameters' dtype and then cast.

    Gains and diagonal get theirs from dW in both forms, so dW is formed for them where the base wants none too:
    with P = dW * W_base, dG = P H, dH = P' G, dd = the diagonal of dW; the base gets diag(G) dW diag(H).

    Args:
        x: (..., I).
        parts: of W, as `weight.accumulate` gives them.
        bias: this layer's own, (O), or None.
        scale: s.
        base_gradient: whether the base gets a gradient from this layer.
        form: `composed`, `thin`, or `auto`: what `is_composed_cheaper` says, so thin for few rows (decoding). The
            increments' gradients come from dW where W is composed and dW is formed anyway, or where
            `is_full_gradient_cheaper` says so; else they are thin.

    Returns:
        (..., O), in x's dtype, or autocast's where it is on.
    """
    device, base = x.device.type, parts.base
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    rows = x.reshape(-1, x.shape[-1])
    composed = form == "composed"
    if form == "auto":
        learns = any(factor.requires_grad for factor in (*parts.ups, *parts.downs))
        alone = not (base_gradient and base.requires_grad) and learns
        out_features, in_features = base.shape
        composed = is_composed_cheaper(len(rows), out_features, in_features, alone and torch.is_grad_enabled())
    settings = CallSettings(base, scale, composed, x.dtype if torch.is_autocast_enabled(device) else base.dtype)
    gains = parts.row, parts.column, parts.diagonal
    with torch.autocast(device, enabled=False):
        y: Tensor = _Member.apply(
            settings, rows, base if base_gradient else None, bias, *gains, *parts.ups, *parts.downs
        )
    return y.reshape(*x.shape[:-1], base.shape[0])


class _Member(torch.autograd.Function):
    """Both forms. Kept for backward: x, the parameters themselves, and in the thin form U = x [A_2; ..; A_l]', (T, R).

    The base comes in `settings` and, where it gets a gradient, as an argument too: a detached copy of it would keep a
    gathered weight of ZeRO 3 alive.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: CallSettings, x: Tensor, base: Tensor | None, bias: Tensor | None, *rest: Tensor | None
    ) -> Tensor:
        parts = _parts(settings.base, rest)
        own_bias = None if bias is None else bias.to(settings.dtype)
        thin = None
        if settings.composed:
            y = torch.nn.functional.linear(x, compose(parts, settings.scale).to(settings.dtype), own_bias)
        else:
            y, thin = _thin_forward(settings, x, parts, own_bias)
        ctx.save_for_backward(x, settings.base, thin, *rest)
        ctx.settings = settings._replace(base=None)  # type: ignore[arg-type] # comes back from the saved tensors, checked
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, base, thin, *rest = ctx.saved_tensors
        settings, parts = ctx.settings._replace(base=base), _parts(base, rest)
        _, wants_x, wants_base, wants_bias, *wants_rest = ctx.needs_input_grad
        wants_gains, wants_factors = wants_rest[:GAINS], wants_rest[GAINS:]
        factors = rest[GAINS:]
        with torch.autocast(x.device.type, enabled=False):
            forms_dw = wants_base or any(wants_gains)
            through_dw = any(wants_factors) and _through_dw(settings, len(x), factors, forms_dw)
            thin_factors = any(wants_factors) and not through_dw
            up, down = _stacked(factors, settings.dtype)
            dthin = (dy @ up).mul_(settings.scale) if thin_factors or not settings.composed else None
            given: Sequence[Tensor | None] = [None] * len(factors)
            if thin_factors and dthin is not None:
                thin = x @ down.t() if thin is None else thin
                given = _cut(factors, (dy.t() @ thin).mul_(settings.scale), dthin.t() @ x)
            dx = None
            if wants_x and settings.composed:
                dx = dy @ compose(parts, settings.scale).to(settings.dtype)
            elif wants_x and dthin is not None:
                dx = _thin_dx(settings, dy, parts).addmm_(dthin, down)
            dbias = dy.sum(0) if wants_bias else None
            dw = dy.t() @ x if forms_dw or through_dw else None
            if through_dw and dw is not None:
                given = _cut(factors, (dw @ down.t()).mul_(settings.scale), (up.t() @ dw).mul_(settings.scale))
            dgains: Sequence[Tensor | None] = [None] * GAINS
            if any(wants_gains) and dw is not None:
                dgains = _gain_gradients(dw, parts)
            if wants_base and dw is not None:
                for gain in (None if parts.row is None else parts.row[:, None], parts.column):
                    dw = dw if gain is None else dw.mul_(gain)
        drest = [d if wanted else None for d, wanted in zip([*dgains, *given], wants_rest, strict=True)]
        return None, dx, dw if wants_base else None, dbias, *drest


GAINS = 3  # row, column and diagonal, before the factors among the arguments


def _parts(base: Tensor, rest: Sequence[Any]) -> Parts:
    """Return the parts of the base and of row, column, diagonal, B_2, .., A_2, .."""
    half = (len(rest) - GAINS) // 2 + GAINS
    return Parts(base, rest[GAINS:half], rest[half:], *rest[:GAINS])


def _thin_forward(settings: CallSettings, x: Tensor, parts: Parts, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return x W' + b, (T, O), and U, (T, R), without forming W."""
    up, down = _stacked([*parts.ups, *parts.downs], settings.dtype)
    thin = x @ down.t()
    scaled = x if parts.column is None else (x * parts.column).to(settings.dtype)
    base = parts.base.to(settings.dtype)
    if parts.row is None:
        y = torch.nn.functional.linear(scaled, base, bias)
    else:
        y = ((scaled @ base.t()) * parts.row).to(settings.dtype)
        y = y if bias is None else y.add_(bias)
    y.addmm_(thin, up.t(), alpha=settings.scale)
    if parts.diagonal is not None:
        y[:, : len(parts.diagonal)] += x[:, : len(parts.diagonal)] * parts.diagonal
    return y, thin


def _thin_dx(settings: CallSettings, dy: Tensor, parts: Parts) -> Tensor:
    """Return dy W, (T, I), of W without its low-rank part, without forming W."""
    scaled = dy if parts.row is None else (dy * parts.row).to(settings.dtype)
    dx = scaled @ parts.base.to(settings.dtype)
    if parts.column is not None:
        dx = (dx * parts.column).to(settings.dtype)
    if parts.diagonal is not None:
        dx[:, : len(parts.diagonal)] += dy[:, : len(parts.diagonal)] * parts.diagonal
    return dx


def _gain_gradients(dw: Tensor, parts: Parts) -> list[Tensor | None]:
    """Return dG, dH and dd from dW (O, I), each None where there is no such gain."""
    drow = dcolumn = ddiagonal = None
    if parts.row is not None or parts.column is not None:
        products = dw * parts.base  # P
        if parts.row is not None:
            drow = products.sum(1) if parts.column is None else products @ parts.column.to(products.dtype)
        if parts.column is not None:
            dcolumn = products.sum(0) if parts.row is None else parts.row.to(products.dtype) @ products
    if parts.diagonal is not None:
        ddiagonal = dw.diagonal().clone()
    return [drow, dcolumn, ddiagonal]


def _stacked(factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return [B_2 | .. | B_l] (O, R) and [A_2; ..; A_l] (R, I) of the factors B_2, .., A_2, .."""
    half = len(factors) // 2
    return torch.cat(list(factors[:half]), 1).to(dtype), torch.cat(list(factors[half:])).to(dtype)


def _through_dw(settings: CallSettings, rows: int, factors: Sequence[Tensor], forms_dw: bool) -> bool:
    rank = sum(up.shape[1] for up in factors[: len(factors) // 2])
    out_features, in_features = settings.base.shape
    return settings.composed if forms_dw else is_full_gradient_cheaper(rows, out_features, in_features, rank)


def _cut(factors: Sequence[Tensor], dup: Tensor, ddown: Tensor) -> list[Tensor]:
    """Return dB_2, .., dA_2, .. from those of the stacks, each of its own: a slice would keep the whole stack alive."""
    ranks = [up.shape[1] for up in factors[: len(factors) // 2]]
    if len(ranks) == 1:
        return [dup, ddown]
    return [part.clone() for part in (*dup.split(ranks, 1), *ddown.split(ranks))]
