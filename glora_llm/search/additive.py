"""The additive search: fit what each choice of each slot adds to the score, propose the best sums, improve the winner.

A supernet's score is close to a sum over its slots, and a parabola in the sum of their slopes (`effects.py`). Backward
passes of random genomes, on a few rows each, say to first order what every choice is worth. Then, instead of scoring
few genomes on all rows, many genomes are scored on a few rows each, and the effects of all choices are fitted at once.
What is fitted says without a forward pass which genome within the limit is best: one by half of the samples, one by all
of them, and one by all of them without the curve (how far the slopes reach is what the first samples tell worst). They
meet the centre so far on a few rows, new samples are taken around the best of them, and the fit is repeated. At the end
all centres race, and with them the best of those that give all layers the same path: on growing parts of the rows the
better half goes on, without what is surely worse than the best, row by row.

What is no sum is left to chance and to the rows: children of the best genomes run heats. A child that is behind the
best genome on a sixteenth of the rows is dropped, then on an eighth, and so on; one that is ahead on all of them takes
its place. Four in five go after the first part, so a heat costs little.
"""

import itertools
import math
from collections.abc import Callable, Generator, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glora_llm.schema import SearchSection
from glora_llm.search.archive import SLOPE_SAMPLES
from glora_llm.search.effects import Effects, Fit, Surface, best_within
from glora_llm.search.space import Code, Space
from glora_llm.search.strategies import STRATEGIES, Ask, Strategy, Values

Parts = list[NDArray[np.int64]]  # numbers of rows
ROUNDS = 8  # fits at most, each after an equal share of the samples
SHARE_SLOPES = 0.15  # of the passes
SHARE_FITTED = 0.4  # of the passes; the rest is for the race and the heats
PARTS = 32  # the rows are cut in so many at most; a genome whose score is fitted is scored on one of them
LEAST = 3  # rows of a part
SLOPE_PARTS = 16  # the same for slopes, of which each costs a backward pass
PROPOSED = 3  # genomes after each fit
CHECKED = 0.125  # share of the rows on which they meet the centre so far
MUTATED = 0.2  # share of the slots that is drawn anew around the centre
RACERS = 10
UNIFORM = 2  # of them, at most, with one path for all layers
RACE_COST = 0.32  # passes of a race for each racer: an eighth of the rows, half as many racers for each next part
WORSE = 2.0  # standard errors of a paired difference at which a racer is dropped
HEAT = 8  # children
FIRST_PART = 16  # a heat begins with so small a part of the rows, and doubles it
ELITE = 4  # genomes scored on all rows that have children
CROSSED = 0.5  # share of the children that have two parents
BRED = 0.08  # share of the slots that is drawn anew in a child
SCREENED = 3  # children that the fitted effects choose one of
SMALLER = (0.75, 0.5, 0.25)  # of the cost of the best proposal: sums that are scored beside it


class Ground(NamedTuple):
    """What is searched: genomes of a space within a limit; and the one generator of all that is random."""

    space: Space
    limit: float
    rng: np.random.Generator


class Known(NamedTuple):
    """A genome that is scored on all rows: its mean, and the score of each row."""

    score: float
    code: Code
    rows: NDArray[np.float64]


@STRATEGIES.register("additive")
def additive(space: Space, settings: SearchSection, limit: float, rows: int) -> Strategy:
    """Fit the effects of single choices to scores of parts of the rows; race the genomes that they propose."""
    ground = Ground(space, limit, np.random.default_rng(settings.seed))
    order = ground.rng.permutation(rows)
    parts = _parts(order, max(1, min(PARTS, rows // LEAST)))
    slopes = yield from _slopes(ground, _parts(order, min(SLOPE_PARTS, rows)), settings.passes * SHARE_SLOPES)
    fit = Fit(space, slopes)
    centres = yield from _sampled(ground, fit, parts, settings.passes * SHARE_FITTED)
    surface = fit.surface()
    uniform = sorted(space.uniforms(limit), key=surface.predict)[-UNIFORM:]
    proposals = [*centres, *uniform, *_propose(ground, fit, surface)]
    smaller = _smaller(space, surface, space.cost(proposals[-1]))
    left = round(settings.passes * (1 - SHARE_SLOPES - SHARE_FITTED) - len(smaller)) * rows
    field = min(RACERS, max(2, round(left / (RACE_COST * rows))))
    racers = _unique(reversed(proposals))[:field]
    winner, used = yield from _race(racers, order, ROUNDS)
    elite, tried = [winner], {code.tobytes() for code in racers}
    for lap in itertools.count(ROUNDS + 1):
        left -= used
        children = _children(ground, elite, surface, tried) if left >= 2 * rows else []
        if not children:
            break
        better, used = yield from _heat(children, elite[0], ground.rng.permutation(rows), lap)
        elite = sorted([*elite, *better], key=lambda known: -known.score)[:ELITE]
    yield Ask(smaller, np.arange(rows), lap)


def _parts(order: NDArray[np.int64], count: int) -> Parts:
    return [np.sort(part) for part in np.array_split(order, count)]


def _slopes(ground: Ground, parts: Parts, passes: float) -> Generator[Ask, Values, Effects]:
    """Return the mean slopes of random genomes, each over one part of the rows."""
    count = max(1, round(passes / SLOPE_SAMPLES * len(parts)))
    found = np.zeros(ground.space.parameters.shape)
    for number, part in enumerate(parts[:count]):
        codes = [ground.space.random(ground.rng, ground.limit) for _ in range(number, count, len(parts))]
        found += (yield Ask(codes, part, 0, slopes=True)).sum(0) / count
    return found


def _sampled(ground: Ground, fit: Fit, parts: Parts, passes: float) -> Generator[Ask, Values, list[Code]]:
    """Score genomes on one part of the rows each: random ones, then around a centre that what is fitted proposes anew.

    Returns:
        the centres.
    """
    rounds = int(np.clip(round(passes / 2), 1, ROUNDS))
    asks = max(rounds, round(passes - rounds * CHECKED * (PROPOSED + 1)))
    centres: list[Code] = []
    for number in range(asks):
        turn, part = number * rounds // asks, number % len(parts)
        if turn > len(centres):
            centres.append((yield from _centre(ground, fit, parts, centres[-1:], turn)))
        codes = [_sample(ground, centres) for _ in parts]
        values = yield Ask(codes, parts[part], turn)
        for code, score in zip(codes, values.mean(1), strict=True):
            fit.add(code, part, float(score))
    return centres


def _sample(ground: Ground, centres: list[Code]) -> Code:
    """Return a genome that differs from the centre, or from all others, in something that many of its layers share."""
    space, limit, rng = ground
    code, share = (centres[-1], MUTATED) if centres else (space.random(rng, limit), 1.0)
    return space.mutate_alike(code, rng, limit, share)


def _centre(ground: Ground, fit: Fit, parts: Parts, before: list[Code], turn: int) -> Generator[Ask, Values, Code]:
    """Return the best of the proposals and of the centre before, on a few parts of the rows."""
    codes = _unique([*_propose(ground, fit, fit.surface()), *before])
    scores = np.zeros(len(codes))
    for part in ground.rng.choice(len(parts), math.ceil(CHECKED * len(parts)), replace=False):
        values = (yield Ask(codes, parts[part], turn)).mean(1)
        scores += values
    for code, score in zip(codes, values, strict=True):
        fit.add(code, int(part), float(score))
    return codes[int(scores.argmax())]


def _smaller(space: Space, surface: Surface, cost: float) -> list[Code]:
    """Return the best sums at shares of a cost: what less would do, the rest of the Pareto front."""
    least = space.costs.min(1).sum()
    return [best_within(space, surface, max(least, cost * share)) for share in SMALLER]


def _propose(ground: Ground, fit: Fit, surface: Surface) -> list[Code]:
    """Return the best genomes by half of the samples, by all of them without a curve, and by all of them."""
    count = len(fit.scores)
    half = ground.rng.choice(count, min(count, max(2, count // 2)), replace=False)
    fitted = (fit.surface(half), fit.surface(curved=False), surface)
    return [best_within(ground.space, found, ground.limit) for found in fitted]


def _children(ground: Ground, elite: list[Known], surface: Surface, tried: set[bytes]) -> list[Code]:
    """Return up to HEAT children of the elite that were not tried yet, each the best of some by the fit."""
    space, limit, rng = ground
    found = list[Code]()
    for _ in range(20 * HEAT):
        if len(found) == HEAT:
            break
        pool = []
        for _ in range(SCREENED):
            one, other = (elite[rng.integers(len(elite))].code for _ in range(2))
            parent = space.cross(one, other, rng, limit) if rng.random() < CROSSED else one
            pool.append(space.mutate(parent, rng, limit, BRED))
        child = max(pool, key=surface.predict)
        if child.tobytes() not in tried:
            tried.add(child.tobytes())
            found.append(child)
    return found


def _unique(codes: Iterable[Code]) -> list[Code]:
    return list({code.tobytes(): code for code in codes}.values())


def _race(racers: list[Code], order: NDArray[np.int64], generation: int) -> Generator[Ask, Values, tuple[Known, int]]:
    """Score racers on growing parts of the rows; the better half goes on, without what is surely worse than the best.

    Returns:
        the winner, and the row scores that the race cost.
    """

    def keep(scores: Values) -> list[int]:
        behind = scores[scores.mean(1).argmax()] - scores
        several = behind.shape[1] > 1  # of one row nothing is sure
        error = behind.std(1, ddof=1) / np.sqrt(behind.shape[1]) if several else np.full(len(scores), np.inf)
        best_first = np.argsort(-scores.mean(1), kind="stable")
        return [i for i in best_first[: max(2, len(scores) // 2)] if behind[i].mean() <= WORSE * error[i]]

    survivors, used = yield from _survivors(racers, order, len(order) // 8, generation, keep)
    return survivors[0], used


def _heat(
    children: list[Code], best: Known, order: NDArray[np.int64], generation: int
) -> Generator[Ask, Values, tuple[list[Known], int]]:
    """Score children on growing parts of the rows, each as long as it is ahead of the best genome on them.

    Returns:
        those that are ahead on all rows, and the row scores that the heat cost.
    """

    def keep(scores: Values) -> list[int]:
        return list(np.flatnonzero(scores.mean(1) > best.rows[order[: scores.shape[1]]].mean()))

    return (yield from _survivors(children, order, len(order) // FIRST_PART, generation, keep))


def _survivors(
    codes: list[Code], order: NDArray[np.int64], first: int, generation: int, keep: Callable[[Values], list[int]]
) -> Generator[Ask, Values, tuple[list[Known], int]]:
    """Score genomes on the first rows of an order, drop some, double the rows, go on.

    Args:
        first: rows of the first part, two at least.
        keep: scores so far, (genomes, rows) -> the genomes that go on, in their order from here on.

    Returns:
        those that are left after all rows, and the row scores that it cost.
    """
    done, end, used = 0, max(2, first), 0
    scores = np.zeros((len(codes), 0))
    while codes and done < len(order):
        scores = np.hstack([scores, (yield from _score(codes, order[done:end], generation))])
        used += len(codes) * len(order[done:end])
        kept = keep(scores)
        codes, scores = [codes[index] for index in kept], scores[kept]
        done, end = end, min(len(order), 2 * end)
    return [_known(code, order, row) for code, row in zip(codes, scores, strict=True)], used


def _score(codes: list[Code], rows: NDArray[np.int64], generation: int) -> Generator[Ask, Values, Values]:
    """Ask for the scores of rows in any order; return them in that order."""
    place = np.argsort(rows)
    values = yield Ask(codes, rows[place], generation)
    return values[:, np.argsort(place)]


def _known(code: Code, order: NDArray[np.int64], scores: NDArray[np.float64]) -> Known:
    rows = np.empty(len(order))
    rows[order] = scores
    return Known(float(rows.mean()), code, rows)
