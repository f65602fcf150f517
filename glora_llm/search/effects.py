"""What each choice of each slot adds to the score: ridge regression on scores of parts of the rows."""

import numpy as np
from numpy.typing import NDArray

from glora_llm.search.space import Code, Space

Effects = NDArray[np.float64]  # (G, choices), -inf where a gene has fewer choices
NOISES = tuple(10.0**power for power in np.arange(-2, 4, 0.5))  # variance of a score over that of an effect


class Fit:
    """Collects scores, and fits one effect for each choice of each gene.

    An effect is the sum of four: of the choice anywhere in the model, in this kind of linear, at this depth, and in
    this layer alone. So scarce samples say what a slot is worth in general, and many say where.

    Args:
        slopes: what first order says of each choice, (G, choices). The effects are a multiple of it, as large as the
            scores say, and what the sums above add to that; before the fit both explain half of the scores.
    """

    def __init__(self, space: Space, slopes: Effects | None = None):
        self.slopes = np.zeros(space.parameters.shape) if slopes is None else slopes
        self.columns = _columns(space)
        self.there = np.isfinite(space.parameters)
        self.features: list[NDArray[np.float64]] = []
        self.scores: list[float] = []
        self.parts: list[int] = []

    def add(self, code: Code, part: int, score: float) -> None:
        """Add the mean score of a genome on one part of the rows."""
        genes = np.arange(len(code))
        row = np.zeros(int(self.columns.max()) + 2)
        np.add.at(row, self.columns[:, genes, code].ravel(), 1.0)
        row[-1] = self.slopes[genes, code].sum()
        self.features.append(row)
        self.scores.append(score)
        self.parts.append(part)

    def effects(self, chosen: NDArray[np.int64] | None = None) -> Effects:
        """Return the effects, fitted to all scores or to a choice of them.

        The noise is the one of the least error on each score left out, which ridge regression has in closed form.
        """
        rows = np.arange(len(self.scores)) if chosen is None else chosen
        parts = np.array(self.parts)[rows]
        features = _within(np.array(self.features)[rows], parts)
        scores = _within(np.array(self.scores)[rows, None], parts)[:, 0]
        own, slope = (max(float((part**2).sum(1).mean()), 1e-12) for part in (features[:, :-1], features[:, -1:]))
        scales = np.append(np.full(features.shape[1] - 1, own**-0.5), slope**-0.5)
        features = features * scales
        values, vectors = np.linalg.eigh(features @ features.T)
        inner = vectors.T @ scores

        def solve(noise: float) -> tuple[float, NDArray[np.float64]]:
            inverse = 1 / (values.clip(0) + noise)
            alpha = vectors @ (inverse * inner)
            left_out = alpha / ((vectors**2) @ inverse)
            return float((left_out**2).sum()), alpha

        _, alpha = min((solve(noise) for noise in NOISES), key=lambda found: found[0])
        weights = features.T @ alpha * scales
        return np.where(self.there, weights[self.columns].sum(0) + weights[-1] * self.slopes, -np.inf)


def _columns(space: Space) -> NDArray[np.int64]:
    """Return (4, G, choices): the columns of the regression that a choice of a gene counts in."""
    widest = space.parameters.shape[1]
    ids: dict[object, int] = {}
    found = np.zeros((4, len(space.genes), widest), np.int64)
    for row, gene in enumerate(space.genes):
        name = space.layers[gene.layer].name
        kind = name.rpartition(".")[2]
        depth = next((part for part in name.split(".") if part.isdigit()), name)
        for level, group in enumerate((("all",), ("kind", kind), ("depth", depth), ("layer", name))):
            for choice in range(widest):
                found[level, row, choice] = ids.setdefault((group, gene.slot, choice), len(ids))
    return found


def _within(values: NDArray[np.float64], parts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Subtract each part's mean: parts differ in difficulty, which is no genome's merit."""
    left = values.copy()
    for part in np.unique(parts):
        left[parts == part] -= left[parts == part].mean(0)
    return left


def best_within(space: Space, effects: Effects, limit: float) -> Code:
    """Return the code of the largest sum of effects within the limit, near enough.

    A price on the cost makes every gene's choice its own (Lagrange); the price is the lowest that keeps the limit. What
    is left over buys the best single changes that still fit.
    """
    free = effects.argmax(1)
    if space.cost(free.astype(np.uint8)) <= limit:
        return free.astype(np.uint8)
    low, high = 0.0, 1.0
    while space.cost(_at_price(space, effects, high)) > limit and high < 1e30:
        low, high = high, high * 4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if space.cost(_at_price(space, effects, middle)) > limit else (low, middle)
    return _spend(space, effects, _at_price(space, effects, high), limit)


def _at_price(space: Space, effects: Effects, price: float) -> Code:
    with np.errstate(invalid="ignore"):
        worth = np.where(np.isfinite(effects), effects - price * space.costs, -np.inf)
    return worth.argmax(1).astype(np.uint8)


def _spend(space: Space, effects: Effects, code: Code, limit: float) -> Code:
    genes = np.arange(len(code))
    while True:
        gain = effects - effects[genes, code][:, None]
        extra = space.costs - space.costs[genes, code][:, None]
        fits = (extra <= limit - space.cost(code)) & (gain > 0)
        if not fits.any():
            return code
        gene, choice = np.unravel_index(np.where(fits, gain, -np.inf).argmax(), gain.shape)
        code[gene] = choice
