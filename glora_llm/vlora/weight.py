"""The weight of a layer as its compound makes it: what each layer adds, and what follows from all of them.

A layer l takes a weight V (of the previous layer in a chain, the base in a star) to

    W_l = diag(1 + g_l) V diag(1 + h_l) + s B_l A_l + diag(d_l)        g (O), h (I), d (min(O, I)); each may be absent

Row and column gains multiply because a product of diagonals moves through a matrix product: with G_j, H_j the
products of 1 + g and 1 + h over the layers after j,

    W_l = diag(G) W_base diag(H) + s sum_j (diag(G_j) B_j) (A_j diag(H_j)) + diag(sum_j G_j H_j d_j)

is of the same form again, so the thin form stays one product with W_base, x -> G * ((x * H) W_base'), and the composed
one costs two products by a vector more. Added gains, V + diag(g) V + V diag(h), would take two products with W_base
where nothing of its size is formed, so they are not offered. Letters: O out_features, I in_features, r rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Added(NamedTuple):
    """The increment of one layer: B (O, r), A (r, I) and, where it has them, g (O), h (I) and d (min(O, I))."""

    up: Tensor
    down: Tensor
    row: Tensor | None = None
    column: Tensor | None = None
    diagonal: Tensor | None = None


class Parts(NamedTuple):
    """W = diag(row) base diag(column) + s sum_j ups_j downs_j + diag(diagonal).

    Args:
        base: W_base, (O, I).
        ups: each (O, r).
        downs: each (r, I).
        row: G (O), which multiplies; None: ones.
        column: H (I), which multiplies; None: ones.
        diagonal: (min(O, I)), which adds to the entries (i, i); None: zeros.
    """

    base: Tensor
    ups: Sequence[Tensor]
    downs: Sequence[Tensor]
    row: Tensor | None = None
    column: Tensor | None = None
    diagonal: Tensor | None = None


def accumulate(base: Tensor, added: Sequence[Added]) -> Parts:
    """Return the parts of a weight, of the base and of what layers add in turn, differentiable.

    Products of gains are taken in float32 at least: in bfloat16, 1 + g would keep nothing of g below 0.004.

    Args:
        base: W_base, (O, I).
        added: in the order of the layers.
    """
    ups: list[Tensor] = []
    downs: list[Tensor] = []
    row: Tensor | None = None
    column: Tensor | None = None
    diagonal: Tensor | None = None
    for one in reversed(added):  # row and column are now the products over the layers after this one
        ups.append(one.up if row is None else (one.up * row[:, None]).to(one.up.dtype))
        downs.append(one.down if column is None else (one.down * column).to(one.down.dtype))
        if one.diagonal is not None:
            scaled = one.diagonal.to(_exact(one.diagonal))
            for gain in (row, column):
                scaled = scaled if gain is None else scaled * gain[: len(scaled)]
            diagonal = scaled if diagonal is None else diagonal + scaled
        row, column = _product(row, one.row), _product(column, one.column)
    return Parts(base, ups[::-1], downs[::-1], row, column, diagonal)


def _product(after: Tensor | None, gain: Tensor | None) -> Tensor | None:
    if gain is None:
        return after
    own = 1 + gain.to(_exact(gain))
    return own if after is None else own * after


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def compose(parts: Parts, scale: float) -> Tensor:
    """Return W, (O, I), in the parameters' dtype: the formula itself. Merging uses this.

    Args:
        scale: s.
    """
    base = parts.base
    if parts.row is not None:
        base = base * parts.row[:, None]
    if parts.column is not None:
        base = base * parts.column
    up, down = torch.cat(list(parts.ups), 1), torch.cat(list(parts.downs))
    weight = torch.addmm(base.to(parts.base.dtype), up, down, alpha=scale)
    if parts.diagonal is not None:
        weight.diagonal().add_(parts.diagonal)
    return weight
