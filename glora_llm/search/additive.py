"""The additive search: fit what each choice of each slot adds to the score, propose the best sums, let them race.

A supernet's score is close to a sum over its slots. So instead of scoring few genomes on all rows, many genomes are
scored on a few rows each, and the effects of all choices are fitted at once. For a sum the best genome within a limit
is found without a forward pass. New samples are taken around it, the fit is repeated, and in the end the proposals
race: on growing parts of the rows, compared row by row with the best of them, what is surely worse is dropped.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from glora_llm.schema import SearchSection
from glora_llm.search.effects import Fit, best_within
from glora_llm.search.space import Code, Space
from glora_llm.search.strategies import STRATEGIES, Ask, Strategy

ROUNDS = 5  # fits, each after an equal share of the samples
SHARE_FITTED = 0.7  # of the passes; the rest is the race's
PARTS = 16  # the rows are scored in so many parts while effects are fitted
MUTATED = 0.15  # share of the slots that is drawn anew around the best genome so far
RACERS = 16
SMALLER = (0.75, 0.5, 0.25)  # of the cost of the best proposal: sums that are scored beside it
WORSE = 2.0  # standard errors of a paired difference at which a racer is dropped


@STRATEGIES.register("additive")
def additive(space: Space, settings: SearchSection, limit: float, rows: int) -> Strategy:
    """Fit the effects of single choices to scores of parts of the rows; race the genomes that they propose."""
    rng = np.random.default_rng(settings.seed)
    order = rng.permutation(rows)
    parts = [np.sort(part) for part in np.array_split(order, min(PARTS, rows))]
    samples = max(2 * ROUNDS, round(settings.passes * SHARE_FITTED * len(parts)))
    fit = Fit(space)
    proposals: list[Code] = []
    for number in range(samples):
        turn = number * ROUNDS // samples
        if turn > len(proposals) // 3:
            proposals += _propose(space, fit, limit, rng)
        code = space.mutate(proposals[-1], rng, limit, MUTATED) if proposals else space.random(rng, limit)
        part = number % len(parts)
        values = yield Ask([code], parts[part], turn)
        fit.add(code, part, float(values.mean()))
    proposals += _propose(space, fit, limit, rng)
    left = round(settings.passes * (1 - SHARE_FITTED) * rows) - len(SMALLER) * rows
    yield from _race(list(_unique(reversed(proposals)))[:RACERS], order, ROUNDS, left)
    effects = fit.effects()
    smaller = [space.cost(proposals[-1]) * share for share in SMALLER]
    codes = [best_within(space, effects, size) for size in smaller if size >= space.costs.min(1).sum()]
    yield Ask(codes, np.arange(rows), ROUNDS)  # what less would cost: the rest of the Pareto front


def _propose(space: Space, fit: Fit, limit: float, rng: np.random.Generator) -> list[Code]:
    """Return the best sums by the effects as fitted to halves of the samples, and last to all of them."""
    count = len(fit.scores)
    halves = [rng.choice(count, max(2, count // 2), replace=False) for _ in range(2)]
    return [best_within(space, fit.effects(half), limit) for half in (*halves, None)]


def _unique(codes: Iterable[Code]) -> Iterable[Code]:
    return {code.tobytes(): code for code in codes}.values()


def _race(racers: list[Code], order: NDArray[np.int64], generation: int, samples: int) -> Strategy:
    """Score racers on a part of the rows, drop what is surely worse than the best, double the part, to the end."""
    done, end = 0, max(8, len(order) // 8)
    scores = np.zeros((len(racers), 0))
    while racers and done < len(order):
        values = yield Ask(racers, np.sort(order[done:end]), generation)
        scores = np.hstack([scores, values])
        leader = scores[scores.mean(1).argmax()]
        behind = leader - scores
        error = behind.std(1, ddof=1) / np.sqrt(behind.shape[1])
        keep = behind.mean(1) <= WORSE * error
        racers, scores = [r for r, kept in zip(racers, keep, strict=True) if kept], scores[keep]
        done, end = end, min(len(order), 2 * end)
        samples -= values.size
        affordable = max(1, samples // max(1, end - done))
        best = np.argsort(-scores.mean(1), kind="stable")[:affordable]
        racers, scores = [racers[index] for index in best], scores[best]
