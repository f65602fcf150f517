"""What each choice of each slot adds to the score, and what they add together: ridge regression on scores.

A supernet learns the choices of each slot in the company of about as much as a random path has. Slots help the loss in
one direction, so many strong choices at once overshoot: the score is close to a sum over the slots and a parabola in
the sum of their slopes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glora_llm.search.space import Code, Space, chosen

Effects = NDArray[np.float64]  # (G, choices), -inf where a gene has fewer choices
NOISES = tuple(10.0**power for power in np.arange(-2, 4, 0.5))  # variance of a score over that of an effect
TREND = 3.0  # times as much of the scores as all effects together, before the fit, is from the line, and from the curve
OUTLIER = 4.0  # median deviations below the median of its part at which a score is left out of a fit
HALVINGS = 20  # of the range that the best sum of slopes is sought in


class Surface(NamedTuple):
    """Score of a code, up to a constant: sum of effects + slope * s + curve * s^2, s the sum of its choices' slopes."""

    effects: Effects
    slopes: Effects  # 0 where a gene has fewer choices
    slope: float
    curve: float  # 0 or less

    def predict(self, code: Code) -> float:
        """Return the score of a code, up to the constant."""
        total = self.total(code)
        return float(chosen(self.effects, code).sum()) + self.slope * total + self.curve * total**2

    def total(self, code: Code) -> float:
        """Return the sum of the slopes of a code's choices."""
        return float(chosen(self.slopes, code).sum())

    def tangent(self, total: float) -> Effects:
        """Return the effects of single choices next to a sum of slopes."""
        return self.effects + (self.slope + 2 * self.curve * total) * self.slopes


class Fit:
    """Collects scores, and fits one effect for each choice of each gene.

    An effect is the sum of four: of the choice anywhere in the model, in this kind of linear, at this depth, and in
    this layer alone. So scarce samples say what a slot is worth in general, and many say where.

    Args:
        slopes: what first order says of each choice, (G, choices); none: zeros.
    """

    def __init__(self, space: Space, slopes: Effects | None = None):
        self.slopes = np.zeros(space.parameters.shape) if slopes is None else slopes
        self.columns = _columns(space)
        self.there = np.isfinite(space.parameters)
        self.features: list[NDArray[np.float64]] = []
        self.totals: list[float] = []
        self.scores: list[float] = []
        self.parts: list[int] = []

    def add(self, code: Code, part: int, score: float) -> None:
        """Add the mean score of a genome on one part of the rows."""
        row = np.zeros(int(self.columns.max()) + 1)
        np.add.at(row, self.columns[:, np.arange(len(code)), code].ravel(), 1.0)
        self.features.append(row)
        self.totals.append(float(chosen(self.slopes, code).sum()))
        self.scores.append(score)
        self.parts.append(part)

    def surface(self, subset: NDArray[np.int64] | None = None, curved: bool = True) -> Surface:
        """Return what is fitted to all scores or to a choice of them, with or without a curve."""
        rows = np.arange(len(self.scores)) if subset is None else subset
        rows = rows[_usual(np.array(self.scores)[rows], np.array(self.parts)[rows])]
        parts = np.array(self.parts)[rows]
        totals = np.array(self.totals)[rows]
        middle = totals.mean()
        line = (totals - middle)[:, None]
        features = _within(np.array(self.features)[rows], parts)
        scores = _within(np.array(self.scores)[rows, None], parts)[:, 0]
        curve = 0.0
        if curved:
            own, (slope, curve) = _ridge(features, _within(np.hstack([line, line**2]), parts), scores)
        if not curved or curve > 0:  # nothing says that more is ever too much
            own, (slope,) = _ridge(features, _within(line, parts), scores)
            curve = 0.0
        effects = np.where(self.there, own[self.columns].sum(0), -np.inf)
        return Surface(effects, self.slopes, float(slope - 2 * curve * middle), float(curve))


def _ridge(
    features: NDArray[np.float64], trend: NDArray[np.float64], scores: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the weights of ridge regression: of the features, and of the few that are the trend.

    The noise is the one of the least error on each score left out, which ridge regression has in closed form.
    """
    scales = [TREND * (trend**2).mean(0).clip(1e-12) ** -0.5, max(float((features**2).sum(1).mean()), 1e-12) ** -0.5]
    columns = np.hstack([trend * scales[0], features * scales[1]])
    values, vectors = np.linalg.eigh(columns @ columns.T)
    inner = vectors.T @ scores

    def solve(noise: float) -> tuple[float, NDArray[np.float64]]:
        inverse = 1 / (values.clip(0) + noise)
        alpha = vectors @ (inverse * inner)
        left_out = alpha / ((vectors**2) @ inverse)
        return float((left_out**2).sum()), alpha

    _, alpha = min((solve(noise) for noise in NOISES), key=lambda found: found[0])
    return features.T @ alpha * scales[1] ** 2, trend.T @ alpha * scales[0] ** 2


def _columns(space: Space) -> NDArray[np.int64]:
    """Return (4, G, choices): the columns of the regression that a choice of a gene counts in."""
    widest, start, found = space.parameters.shape[1], 0, []
    for groups in space.levels:
        found.append(start + groups[:, None] * widest + np.arange(widest))
        start = int(found[-1].max()) + 1
    return np.array(found)


def _usual(scores: NDArray[np.float64], parts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return which scores are not far below the others of their part: how bad a genome is says little of the best."""
    ahead = _within(scores[:, None], parts, np.median)[:, 0]
    return np.flatnonzero(ahead >= -OUTLIER * np.median(abs(ahead)))


def _within(
    values: NDArray[np.float64], parts: NDArray[np.int64], middle: Callable[..., Any] = np.mean
) -> NDArray[np.float64]:
    """Subtract the middle of each part: parts differ in difficulty, which is no genome's merit."""
    left = values.copy()
    for part in np.unique(parts):
        left[parts == part] -= middle(left[parts == part], axis=0)
    return left


def best_within(space: Space, surface: Surface, limit: float) -> Code:
    """Return the code of the best predicted score within the limit, near enough.

    A parabola that opens downwards lies below each of its tangents, and the best code of a tangent has the less of
    slopes the further out the tangent touches: halving finds the tangent that touches where its own best code is.
    """
    if surface.curve == 0:
        return _best_sum(space, surface.tangent(0.0), limit)
    there = np.isfinite(surface.effects)
    low = float(np.where(there, surface.slopes, np.inf).min(1).sum())
    high = float(np.where(there, surface.slopes, -np.inf).max(1).sum())
    codes = []
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        codes.append(_best_sum(space, surface.tangent(middle), limit))
        low, high = (middle, high) if surface.total(codes[-1]) > middle else (low, middle)
    return max(codes, key=surface.predict)


def _best_sum(space: Space, effects: Effects, limit: float) -> Code:
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
    while True:
        gain = effects - chosen(effects, code)[:, None]
        extra = space.costs - chosen(space.costs, code)[:, None]
        fits = (extra <= limit - space.cost(code)) & (gain > 0)
        if not fits.any():
            return code
        gene, choice = np.unravel_index(np.where(fits, gain, -np.inf).argmax(), gain.shape)
        code[gene] = choice
