"""The best genome of a sum of scores under several limits at once: a multiple-choice knapsack, solved exactly.

Every gene (a slot of a layer) takes one of its choices; the sum of the scores is to be largest, and each of several
costs (parameters, seconds, megabytes) stays within its limit. It is given to HiGHS, the solver of scipy, as an integer
programme: a 0 or 1 for every choice, which sum to 1 in each gene. HiGHS proves how far its answer may be from the best.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glora_llm.errors import UserError

GAP = 1e-6  # share of the best score by which the answer may be below it
SECONDS = 120.0  # of one solution


class Limit(NamedTuple):
    """A cost of each choice, and what their sum may be."""

    costs: NDArray[np.float64]  # (G, C), inf where a gene has fewer choices
    most: float


class Chosen(NamedTuple):
    """A code, and how good it is."""

    code: NDArray[np.uint8]  # (G), the choice of each gene
    score: float
    bound: float  # no code has more


def choose(scores: NDArray[np.float64], limits: Sequence[Limit]) -> Chosen:
    """Return the code of the largest sum of scores within all limits, to GAP of it.

    Args:
        scores: (G, C) of each choice of each gene.
        limits: at least one.

    Raises:
        UserError: when no code is within the limits, or the solver gives none in time.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    genes, choices = np.nonzero(np.isfinite(limits[0].costs))
    count = np.arange(len(genes))
    one_each = coo_array((np.ones(len(genes)), (genes, count)), shape=(len(scores), len(genes)))
    constraints = [LinearConstraint(one_each.tocsr(), 1, 1)]
    for limit in limits:
        if np.isfinite(limit.most):
            scale = max(limit.most, 1e-30)  # costs of about one, whatever their unit
            constraints.append(LinearConstraint(limit.costs[genes, choices][None] / scale, -np.inf, 1.0))
    values = scores[genes, choices]
    unit = float(np.abs(values).max()) or 1.0
    found = milp(
        -values / unit,
        integrality=np.ones(len(genes)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if found.x is None:
        raise UserError(f"adapter.budget: no structure was found within it: {found.message}")
    code = np.zeros(len(scores), np.uint8)
    taken = found.x > 0.5
    code[genes[taken]] = choices[taken]
    score = float(scores[np.arange(len(scores)), code].sum())
    bound = score if found.mip_dual_bound is None else float(-found.mip_dual_bound * unit)
    return Chosen(code, score, bound)
