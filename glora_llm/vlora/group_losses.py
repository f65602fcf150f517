"""The losses of groups of layers that share, for every rank: decomposed, or estimated where nobody would choose them.

The loss of a linear of layer l, in a group of c layers whose base M is the mean of their weights and whose increments
have rank r, is

    |diag(g_l) (W_l - M - B_l A_l) R_l|^2     (Frobenius)

with R_l R_l' = E[x x'] of its inputs x, and g_l the root mean squares of the gradient of the model's loss at each of
its outputs: the mean square of the error of its outputs, weighted output by output. Half of it is an estimate of how
much that error raises the loss of a token, in nats: the second-order term of the loss, with the first-order term left
out (as of a trained model), the Hessian replaced by products of gradients (the empirical Fisher matrix), of which the
diagonal over outputs and tokens alone is kept, independent of the inputs. Errors of several linears are added up, as
if the Fisher matrix had nothing between them. Layers and linears differ by 10^4 in g^2, which is what the choice is to
know.
Sources: the second-order saliency of LeCun et al. (Optimal Brain Damage, 1990) and Hassibi and Stork (Optimal Brain
Surgeon, 1993); factors of the Fisher matrix from inputs and gradients, Martens and Grosse (K-FAC, arXiv 1503.05671);
Fisher weights in a singular value decomposition, Hsu et al. (FWSVD, arXiv 2207.00112); inputs by the Cholesky factor of
their products, Wang et al. (SVD-LLM, arXiv 2403.07378).

Where no gradients were measured, 1 / |W_l R_l| stands in place of g_l: errors are relative to the outputs.

The best B_l A_l leaves the singular values behind the first r, so one decomposition gives all ranks.

Decomposing every layer of every group is what costs: 902 decompositions for each linear of 30 layers. So for each
group size c the groups that begin at 0, c, 2 c, .. are decomposed, which is every layer once, and the others are
estimated: |(W_l - M) diag(s_l)|^2, s_l^2 the mean squares of inputs, follows for all groups at once from sums of
products of columns, and the loss over it, at each rank, is taken to be that of the same layer in the decomposed group
of c layers.

Letters: L layers, c layers of a group, (O, I) a weight, S = min(O, I), r rank, R ranks on offer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from glora_llm.vlora.groups import Calibration, Group, exact, product, smaller_gram

RANKS = 64  # ranks that are looked at, at most: multiples of the smaller side over this
SMALL_SIDE = 256  # with a smaller side up to this a decomposition takes a millisecond: all groups are decomposed
# An estimate is lowered by this over c, so that it is rather too low: another layer in a group changes the base by
# 1 / c of it. The estimates of SmolLM2-135M were too high by 0.54 / c at most with relative errors and sizes of inputs
# alone, by 0.23 / c with gradients and products of inputs (90 groups).
DOUBT = 0.6
TINY = np.finfo(np.float64).tiny
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
        measured: of inputs and outputs; None: nothing is known of the weights (which may have no values), and all
            differ alike.

    Attributes:
        candidates: all of them.
        full: parameters of one layer's linear.
    """

    candidates: list[Candidate]
    full: int
    _measured: Calibration
    _g: list[Tensor]
    _squares: list[Tensor]  # s^2 of each layer, (I)

    def __init__(self, layers: Sequence[nn.Module], name: str, measured: Calibration | None) -> None:
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
        if measured is None:
            for group in shared:
                group.losses, group.exact = _unknown_losses(group, self._side), True
            return
        self._measured, self._name = measured, name
        self._g = [self._gradients(layer) for layer in range(layer_count)]
        self._squares = [self._square_inputs(layer) for layer in range(layer_count)]
        self._look_at(shared)

    def _look_at(self, shared: Sequence[Candidate]) -> None:
        """Decompose the groups that lie end to end, or all of a small linear, and estimate the others."""
        # (count, layer) -> loss at each rank over the size of the difference, (S + 1)
        falls: dict[tuple[int, int], Floats] = {}
        everywhere = self._side <= SMALL_SIDE
        products = None if everywhere else _column_products(self._weights)
        for group in shared:
            if everywhere:
                self.decompose(group)
            elif products is not None and group.first % group.count == 0:
                tails = self.decompose(group) / np.maximum(self._sizes(group, products), TINY)[:, None]
                falls |= {(group.count, number): fall for number, fall in enumerate(tails, group.first)}
        for group in shared:
            if products is not None and not group.exact:
                sizes = self._sizes(group, products)
                estimate = sum(size * falls[group.count, n][group.ranks] for n, size in enumerate(sizes, group.first))
                group.losses = (1 - DOUBT / group.count) * np.asarray(estimate)

    @torch.no_grad()
    def decompose(self, group: Candidate) -> Floats:
        """Make the losses of a candidate exact; return them layer by layer for every rank from 0, (c, S + 1)."""
        mine = self._weights[group.first : group.end]
        mean = sum((exact(weight) for weight in mine), start=torch.zeros_like(exact(mine[0]))) / group.count
        tails = np.zeros((group.count, self._side + 1))
        for place, (weight, g) in enumerate(zip(mine, self._g[group.first : group.end], strict=True)):
            root = self._measured.root((group.first + place, self._name), mean)
            gram = smaller_gram(g * product(exact(weight) - mean, root))
            squares = torch.linalg.eigvalsh(gram).clamp(min=0)  # of the singular values, the smallest first
            tails[place, :-1] = np.cumsum(squares.double().cpu().numpy())[::-1]
        group.losses, group.exact = tails.sum(0)[group.ranks], True
        return tails

    def _gradients(self, layer: int) -> Tensor:
        """Return g of a layer, (O, 1), or one number where errors are relative."""
        weight = exact(self._weights[layer])
        if self._measured.gradients:
            g = self._measured.gradient((layer, self._name), weight)
            return torch.zeros_like(weight[:, :1]) if g is None else g
        size = torch.linalg.vector_norm(product(weight, self._measured.root((layer, self._name), weight)))
        return 1 / size.clamp(min=torch.finfo(size.dtype).tiny ** 0.5)

    def _sizes(self, group: Candidate, products: Tensor) -> Floats:
        """Return |(W_l - M) diag(s_l)|^2 of each layer of a group.

        Args:
            products: of columns, (I, L, L).
        """
        mine = products[:, group.first : group.end, group.first : group.end]
        own = mine.diagonal(dim1=1, dim2=2)
        columns = (own - 2 * mine.mean(2) + mine.mean((1, 2))[:, None]).clamp(min=0)  # |W_l - M|^2, (I, c)
        squares = torch.stack(self._squares[group.first : group.end])
        return np.asarray((squares * columns.T).sum(1).cpu())

    def _square_inputs(self, layer: int) -> Tensor:
        """Return s^2 of a layer, (I)."""
        row = exact(self._weights[layer])[0]
        root = self._measured.root((layer, self._name), row)
        return torch.ones_like(row).double() if root is None else root.double().square().sum(1)


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
