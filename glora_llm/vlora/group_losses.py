"""The losses of groups of layers that share, for every rank: decomposed, or estimated where nobody would choose them.

The loss of a linear of layer l, in a group of c layers whose base M is the mean of their weights and whose increments
have rank r, is

    |(W_l - M - B_l A_l) diag(s_l)|^2 / |W_l diag(s_l)|^2     (Frobenius)

with s_l the root mean squares of its inputs: the squared error of its outputs, relative to them, where inputs are
uncorrelated. The best B_l A_l leaves the singular values behind the first r, so one decomposition gives all ranks.

Decomposing every layer of every group is what costs: 902 decompositions for each linear of 30 layers. So for each
group size c the groups that begin at 0, c, 2 c, .. are decomposed, which is every layer once, and the others are
estimated: at rank 0 the loss is |(W_l - M) diag(s_l)|^2, which sums of products of columns give exactly for all groups
at once, and at rank r it is taken to fall as that of the same layer in the decomposed group of c layers.

Letters: L layers, c layers of a group, (O, I) a weight, S = min(O, I), r rank, R ranks on offer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from glora_llm.vlora.groups import Group, InputScales, exact

RANKS = 64  # ranks that are looked at, at most: multiples of the smaller side over this
SMALL_SIDE = 256  # with a smaller side up to this a decomposition takes a millisecond: all groups are decomposed
# An estimate is lowered by this over c, so that it is rather too low: another layer in a group changes the base by
# 1 / c of it. The estimates of SmolLM2-135M were too high by 0.54 / c at most.
DOUBT = 0.6
CHUNK = 2**24  # elements of a stack of rows that are multiplied at once

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass
class Candidate:
    """A group that may be chosen, at any of several ranks.

    Args:
        linear, first, count: as of `Group`.
        ranks: (R), rising; 0 alone where the group is one layer.
        costs: (R) its parameters.
        losses: (R) the sum of its layers' losses; estimates where it is not exact.
        exact: whether losses are those of a decomposition.
    """

    linear: str
    first: int
    count: int
    ranks: Integers
    costs: Integers
    losses: Floats
    exact: bool = True

    @property
    def end(self) -> int:
        """The layer after its last one."""
        return self.first + self.count

    def group(self, place: int) -> Group:
        """Return the group at one of its ranks."""
        return Group(self.linear, self.first, self.count, int(self.ranks[place]))


class LinearLosses:
    """The candidates of one linear: single layers, and groups of as many as divide the layers, wherever they begin.

    Args:
        layers: of a dense model, in order.
        name: of the linear inside a layer.
        scales: s_l; None: nothing is known about the weights (which may have no values), and all differ alike.

    Attributes:
        candidates: all of them.
        full: parameters of one layer's linear.
    """

    candidates: list[Candidate]
    full: int

    def __init__(self, layers: Sequence[nn.Module], name: str, scales: InputScales | None) -> None:
        self._weights: list[Any] = [layer.get_submodule(name).weight for layer in layers]
        out_features, in_features = (int(size) for size in self._weights[0].shape)
        self._side = min(out_features, in_features)
        self.full = out_features * in_features
        layer_count = len(layers)
        self.candidates = [_single(name, number, self.full) for number in range(layer_count)]
        counts = [count for count in range(2, layer_count + 1) if layer_count % count == 0]
        step = _rank_step(self._side)
        shared = []
        for count in counts:
            own = [r * (out_features + in_features) * count for r in range(step, self._side, step)]
            costs = np.array([self.full + cost for cost in own if cost < (count - 1) * self.full], dtype=np.int64)
            ranks = step * np.arange(1, len(costs) + 1)
            for first in range(layer_count - count + 1) if len(ranks) else ():
                shared.append(Candidate(name, first, count, ranks, costs, np.zeros(len(ranks)), exact=False))
        self.candidates += shared
        if scales is None:
            for group in shared:
                group.losses, group.exact = _unknown_losses(group, self._side), True
            return
        self._s = [_scale(weight, scales.get((n, name))) for n, weight in enumerate(self._weights)]
        self._sizes = [_size(weight, s) for weight, s in zip(self._weights, self._s, strict=True)]
        self._look_at(shared)

    def _look_at(self, shared: Sequence[Candidate]) -> None:
        """Decompose the groups that lie end to end, or all of a small linear, and estimate the others."""
        falls: dict[tuple[int, int], Floats] = {}  # (count, layer) -> loss at each rank over that at rank 0, (S + 1)
        for group in shared:
            if group.first % group.count == 0 or self._side <= SMALL_SIDE:
                for number, tails in enumerate(self.decompose(group), group.first):
                    falls[group.count, number] = tails / max(tails[0], np.finfo(np.float64).tiny)
        rest = [group for group in shared if not group.exact]
        if not rest:
            return
        products = _column_products(self._weights)
        for group in rest:
            whole = self._without_increments(group, products)
            estimate = sum(loss * falls[group.count, n] for n, loss in enumerate(whole, group.first))
            group.losses = (1 - DOUBT / group.count) * np.asarray(estimate)[group.ranks]

    @torch.no_grad()
    def decompose(self, group: Candidate) -> Floats:
        """Make the losses of a candidate exact; return them layer by layer for every rank from 0, (c, S + 1)."""
        mine = torch.stack([exact(weight) for weight in self._weights[group.first : group.end]])
        difference = (mine - mine.mean(0)) * torch.stack(self._s[group.first : group.end])[:, None, :]
        tall = difference.shape[1] > difference.shape[2]
        gram = difference.mT @ difference if tall else difference @ difference.mT
        squares = torch.linalg.eigvalsh(gram).clamp(min=0)  # of the singular values, the smallest first
        relative = (squares / torch.stack(self._sizes[group.first : group.end])[:, None]).double().cpu().numpy()
        tails = np.zeros((group.count, self._side + 1))
        tails[:, :-1] = np.cumsum(relative, axis=1)[:, ::-1]
        group.losses, group.exact = tails.sum(0)[group.ranks], True
        return tails

    def _without_increments(self, group: Candidate, products: Tensor) -> list[float]:
        """Return |(W_l - M) diag(s_l)|^2 / |W_l diag(s_l)|^2 of each layer of a group.

        Args:
            products: of columns, (I, L, L).
        """
        mine = products[:, group.first : group.end, group.first : group.end]
        own = mine.diagonal(dim1=1, dim2=2)
        columns = (own - 2 * mine.mean(2) + mine.mean((1, 2))[:, None]).clamp(min=0)  # |W_l - M|^2, (I, c)
        s = torch.stack(self._s[group.first : group.end]).double()
        sizes = torch.stack(self._sizes[group.first : group.end]).double()
        found: list[float] = ((s.square() * columns.T).sum(1) / sizes).tolist()
        return found


def _single(name: str, number: int, full: int) -> Candidate:
    """Return a layer that shares with none: it costs its weight and loses nothing."""
    return Candidate(name, number, 1, np.zeros(1, dtype=np.int64), np.full(1, full, dtype=np.int64), np.zeros(1))


def _rank_step(side: int) -> int:
    """Return the step between ranks: a multiple of 8 where ranks are large enough for that to matter little."""
    step = max(1, side // RANKS)
    return step - step % 8 if step >= 8 else step


def _unknown_losses(group: Candidate, side: int) -> Floats:
    """Return the losses where nothing is known: weights are independent, and their singular values are equal."""
    losses: Floats = (group.count - 1) * (1 - group.ranks / side)
    return losses


def _scale(weight: nn.Parameter, s: Tensor | None) -> Tensor:
    mine = exact(weight)
    return torch.ones_like(mine[0]) if s is None else s.to(mine)


def _size(weight: nn.Parameter, s: Tensor) -> Tensor:
    """Return |W diag(s)|^2, never 0."""
    return (exact(weight) * s).square().sum().clamp(min=torch.finfo(s.dtype).tiny)


@torch.no_grad()
def _column_products(weights: Sequence[nn.Parameter]) -> Tensor:
    """Return <column i of W_l, column i of W_m>, (I, L, L) in float64, from stacks of a few rows of all weights."""
    out_features, in_features = weights[0].shape
    rows = max(1, CHUNK // (len(weights) * in_features))
    products = torch.zeros(in_features, len(weights), len(weights), dtype=torch.float64, device=weights[0].device)
    for start in range(0, out_features, rows):
        part = torch.stack([exact(weight[start : start + rows]) for weight in weights]).permute(2, 0, 1)  # (I, L, rows)
        products += part @ part.mT
    return products
