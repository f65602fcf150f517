"""The additive search: fit what each choice of each slot adds to the score, propose the best sums, let them race.

A supernet's score is close to a sum over its slots. So instead of scoring few genomes on all rows, many genomes are
scored on a few rows each, and the effects of all choices are fitted at once. For a sum the best genome within a limit
is found without a forward pass. New samples are taken around it, the fit is repeated, and in the end the proposals
race: on growing parts of the rows the better half goes on, without what is surely worse than the best, row by row. The
winners breed, and their children race with them.
"""

import itertools
from collections.abc import Generator, Iterable

import numpy as np
from numpy.typing import NDArray

from glora_llm.schema import SearchSection
from glora_llm.search.effects import Effects, Fit, best_within
from glora_llm.search.space import Code, Space
from glora_llm.search.strategies import STRATEGIES, Ask, Strategy, Values

ROUNDS = 10  # fits, each after an equal share of the samples
SHARE_FITTED = 0.55  # of the passes; the rest is for the races
PARTS = 16  # the rows are cut in so many; while effects are fitted, so many genomes are scored on one part at a time
PROPOSED = 3  # genomes after each fit
MUTATED = 0.2  # share of the slots that is drawn anew around the best genome so far
RACERS = 10
RACE_COST = 0.32  # passes of a race for each racer: an eighth of the rows, half as many racers for each next part
BRED = 0.08  # share of the slots that is drawn anew in a child of two winners of a race
SCREENED = 8  # children that the fitted effects choose one of
WINNERS = 4
WORSE = 2.0  # standard errors of a paired difference at which a racer is dropped
SMALLER = (0.75, 0.5, 0.25)  # of the cost of the best proposal: sums that are scored beside it


@STRATEGIES.register("additive")
def additive(space: Space, settings: SearchSection, limit: float, rows: int) -> Strategy:
    """Fit the effects of single choices to scores of parts of the rows; race the genomes that they propose."""
    rng = np.random.default_rng(settings.seed)
    order = rng.permutation(rows)
    parts = [np.sort(part) for part in np.array_split(order, min(PARTS, rows))]
    asks = max(ROUNDS, round(settings.passes * SHARE_FITTED))
    fit = Fit(space)
    proposals: list[Code] = []
    for number in range(asks):
        turn = number * ROUNDS // asks
        if turn > len(proposals) // PROPOSED:
            proposals += _propose(space, fit, fit.effects(), limit, rng)
        part = number % len(parts)
        codes = [_sample(space, proposals, limit, rng) for _ in parts]
        values = yield Ask(codes, parts[part], turn)
        for code, score in zip(codes, values.mean(1), strict=True):
            fit.add(code, part, float(score))
    effects = fit.effects()
    proposals += _propose(space, fit, effects, limit, rng)
    smaller = _smaller(space, effects, space.cost(proposals[-1]))
    left = round(settings.passes * (1 - SHARE_FITTED) - len(smaller)) * rows
    field = min(RACERS, max(2, round(left / (RACE_COST * rows))))
    racers = _unique(reversed(proposals))[:field]
    seen: set[tuple[bytes, int]] = set()
    for lap in itertools.count(ROUNDS):
        winners, used = yield from _race(racers, order, lap, seen)
        left -= used
        if left < used or not used:
            break
        children = [_child(space, winners, effects, limit, rng) for _ in range(field - len(winners))]
        racers = _unique([*winners, *children])
    yield Ask(smaller, np.arange(rows), lap)


def _sample(space: Space, proposals: list[Code], limit: float, rng: np.random.Generator) -> Code:
    return space.mutate(proposals[-1], rng, limit, MUTATED) if proposals else space.random(rng, limit)


def _smaller(space: Space, effects: Effects, cost: float) -> list[Code]:
    """Return the best sums at shares of a cost: what less would do, the rest of the Pareto front."""
    least = space.costs.min(1).sum()
    return [best_within(space, effects, max(least, cost * share)) for share in SMALLER]


def _propose(space: Space, fit: Fit, effects: Effects, limit: float, rng: np.random.Generator) -> list[Code]:
    """Return the best sums by effects fitted to halves of the samples, and last by those fitted to all of them."""
    count = len(fit.scores)
    halves = [rng.choice(count, max(2, count // 2), replace=False) for _ in range(2)]
    return [best_within(space, found, limit) for found in (*map(fit.effects, halves), effects)]


def _child(space: Space, winners: list[Code], effects: Effects, limit: float, rng: np.random.Generator) -> Code:
    """Return the child of two winners that the effects speak best of, out of several."""
    genes, children = np.arange(len(space.genes)), []
    for _ in range(SCREENED):
        one, other = (winners[rng.integers(len(winners))] for _ in range(2))
        children.append(space.mutate(space.cross(one, other, rng, limit), rng, limit, BRED))
    return max(children, key=lambda code: float(effects[genes, code].sum()))


def _unique(codes: Iterable[Code]) -> list[Code]:
    return list({code.tobytes(): code for code in codes}.values())


def _race(
    racers: list[Code], order: NDArray[np.int64], generation: int, seen: set[tuple[bytes, int]]
) -> Generator[Ask, Values, tuple[list[Code], int]]:
    """Score racers on a part of the rows, keep the better half without what is surely worse than the best, go on.

    Args:
        seen: (genome, first row of a part) of all races so far; what is in it costs nothing again.

    Returns:
        the best, best first, and the row scores that this race cost.
    """
    done, end, used = 0, max(2, len(order) // 8), 0
    scores = np.zeros((len(racers), 0))
    ranked = list(racers)
    while done < len(order):
        values = yield Ask(racers, np.sort(order[done:end]), generation)
        parts = {(code.tobytes(), done) for code in racers}
        used += len(parts - seen) * values.shape[1]
        seen |= parts
        scores = np.hstack([scores, values])
        behind = scores[scores.mean(1).argmax()] - scores
        error = behind.std(1, ddof=1) / np.sqrt(behind.shape[1])
        best_first = np.argsort(-scores.mean(1), kind="stable")
        ranked = [racers[index] for index in best_first] + ranked[len(racers) :]
        keep = [i for i in best_first[: max(2, len(racers) // 2)] if behind[i].mean() <= WORSE * error[i]]
        racers, scores = [racers[index] for index in keep], scores[keep]
        done, end = end, min(len(order), 2 * end)
    return ranked[:WINNERS], used
