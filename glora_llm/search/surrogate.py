"""The surrogate model of the additive search: it predicts the score of a genome without a forward pass.

Letters: G genes, C choices of a gene, N observations, F columns of the regression.

    score(code) = constant + sum_g effect[g, code_g] + slope * t + curve * t^2,    t = sum_g importance[g, code_g]

The sum is what each choice adds by itself. The parabola in t, the summed first-order importance, is what choices do
together: a supernet learns each choice in the company of about as much as a random path has, and choices push the loss
in one direction, so many strong ones at once overshoot. All coefficients come from one ridge regression on scores of
genomes on parts of the rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glora_llm.search.space import Code, Space, chosen

ChoiceTable = NDArray[np.float64]  # (G, C), one value for each choice of each gene
NOISES = tuple(10.0**power for power in np.arange(-2, 4, 0.5))  # variance of a score over that of an effect
TREND = 3.0  # prior variance of the line, and of the parabola, over that of all effects together
OUTLIER = 4.0  # median deviations below the median of its part at which a score is left out


class Surrogate(NamedTuple):
    """A fitted surrogate model; it predicts up to a constant.

    Attributes:
        effects: of single choices, -inf where a gene has fewer choices.
        importance: first-order importance of each choice, 0 where a gene has fewer choices.
        slope: coefficient of the summed importance.
        curve: coefficient of its square, 0 or less.
    """

    effects: ChoiceTable
    importance: ChoiceTable
    slope: float
    curve: float

    def predict(self, code: Code) -> float:
        """Return the predicted score of a code, up to the constant."""
        total = self.total_importance(code)
        own = float(chosen(self.effects, code).sum())
        return own + self.slope * total + self.curve * total**2

    def total_importance(self, code: Code) -> float:
        """Return t, the sum of the first-order importance of a code's choices."""
        return float(chosen(self.importance, code).sum())

    def tangent(self, total: float) -> ChoiceTable:
        """Return the effects of single choices in the tangent of the parabola at t = `total`."""
        return self.effects + (self.slope + 2 * self.curve * total) * self.importance


class Observations:
    """Scores of genomes on parts of the rows, to which a surrogate model is fitted.

    The effect of a choice is a sum of four: of the choice anywhere in the model, in this kind of linear, at this depth,
    and in this layer alone. So few samples say what a slot is worth in general, and many say where.

    Args:
        importance: first-order importance of each choice; None: zeros.
    """

    def __init__(self, space: Space, importance: ChoiceTable | None = None):
        self.importance = np.zeros(space.parameters.shape) if importance is None else importance
        self.columns = _columns(space)
        self.is_choice = np.isfinite(space.parameters)
        self.features: list[NDArray[np.float64]] = []
        self.totals: list[float] = []
        self.scores: list[float] = []
        self.parts: list[int] = []

    def add(self, code: Code, part: int, score: float) -> None:
        """Add the mean score of a genome on one part of the rows."""
        row = np.zeros(int(self.columns.max()) + 1)
        columns_of_code = self.columns[:, np.arange(len(code)), code]  # (4, G)
        np.add.at(row, columns_of_code.ravel(), 1.0)
        self.features.append(row)
        self.totals.append(float(chosen(self.importance, code).sum()))
        self.scores.append(score)
        self.parts.append(part)

    def fit(self, subset: NDArray[np.int64] | None = None, with_curve: bool = True) -> Surrogate:
        """Fit a surrogate model to all observations or to some of them, with or without the parabola."""
        rows = np.arange(len(self.scores)) if subset is None else subset
        rows = rows[_not_far_below(np.array(self.scores)[rows], np.array(self.parts)[rows])]
        parts = np.array(self.parts)[rows]
        totals = np.array(self.totals)[rows]
        middle = totals.mean()

        # Parts differ in difficulty, so every column is taken relative to its part.
        features = _centred(np.array(self.features)[rows], parts)  # (N, F)
        scores = _centred(np.array(self.scores)[rows, None], parts)[:, 0]  # (N)
        line = (totals - middle)[:, None]  # (N, 1), centred so that line and parabola are nearly uncorrelated

        curve = 0.0
        if with_curve:
            trend = _centred(np.hstack([line, line**2]), parts)
            weights, (slope, curve) = _ridge(features, trend, scores)
        if not with_curve or curve > 0:  # nothing says that more is ever too much
            weights, (slope,) = _ridge(features, _centred(line, parts), scores)
            curve = 0.0

        effects = np.where(self.is_choice, weights[self.columns].sum(0), -np.inf)
        # slope (t - m) + curve (t - m)^2 = (slope - 2 curve m) t + curve t^2 + constant
        return Surrogate(effects, self.importance, float(slope - 2 * curve * middle), float(curve))


def _ridge(
    features: NDArray[np.float64], trend: NDArray[np.float64], scores: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit ridge regression in its dual form, by the noise with the least leave-one-out error.

    Args:
        features: (N, F), one column for each effect.
        trend: (N, 1 or 2), the line and the parabola.
        scores: (N).

    Returns:
        the weights of the features (F), and of the trend.
    """
    # A column of the trend has TREND^2 times the prior variance of all effects of a genome together.
    trend_scale = TREND * (trend**2).mean(0).clip(1e-12) ** -0.5
    feature_scale = max(float((features**2).sum(1).mean()), 1e-12) ** -0.5
    columns = np.hstack([trend * trend_scale, features * feature_scale])

    # One eigendecomposition of the kernel (N, N) serves all noises: (K + noise)^-1 = U (values + noise)^-1 U'.
    values, vectors = np.linalg.eigh(columns @ columns.T)
    projected = vectors.T @ scores

    def solve(noise: float) -> tuple[float, NDArray[np.float64]]:
        """Return the squared leave-one-out error, and the dual weights (N)."""
        inverse = 1 / (values.clip(0) + noise)
        dual = vectors @ (inverse * projected)
        diagonal = (vectors**2) @ inverse  # of (K + noise)^-1
        left_out = dual / diagonal  # error on each score if it had been left out of the fit
        return float((left_out**2).sum()), dual

    _, dual = min((solve(noise) for noise in NOISES), key=lambda found: found[0])
    return features.T @ dual * feature_scale**2, trend.T @ dual * trend_scale**2


def _columns(space: Space) -> NDArray[np.int64]:
    """Return (4, G, C): the columns of the regression that a choice of a gene counts in, one at each level."""
    widest = space.parameters.shape[1]
    first_column, found = 0, []
    for groups in space.levels:
        found.append(first_column + groups[:, None] * widest + np.arange(widest))
        first_column = int(found[-1].max()) + 1
    return np.array(found)


def _not_far_below(scores: NDArray[np.float64], parts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the numbers of scores that are no low outliers of their part: they say little of the best genomes."""
    ahead = _centred(scores[:, None], parts, np.median)[:, 0]
    return np.flatnonzero(ahead >= -OUTLIER * np.median(abs(ahead)))


def _centred(
    values: NDArray[np.float64], parts: NDArray[np.int64], middle: Callable[..., Any] = np.mean
) -> NDArray[np.float64]:
    """Subtract the mean (or another middle) of each part from its rows: a hard part is no genome's fault."""
    centred = values.copy()
    for part in np.unique(parts):
        centred[parts == part] -= middle(centred[parts == part], axis=0)
    return centred
