"""The additive search: a surrogate model of sums over slots proposes genomes, successive halving decides among them.

1. First-order importance. Backward passes of random genomes, on a few rows each, tell to first order what every choice
   of every slot is worth.
2. Sampling. Many genomes are scored on a few rows each, rather than few on all rows, and a surrogate model
   (`surrogate.py`) is fitted to them. It says without a forward pass which genome within the limit is best. Three fits
   propose one each: to half of the samples, to all, and to all without the parabola (how far importance reaches is what
   the first samples tell worst). The proposals and the incumbent are scored on a few rows; the best is the next
   incumbent, new samples are drawn around it, and the fit is repeated.
3. Successive halving of all incumbents, the last proposals and the best genomes with one path for all layers
   (`halving.py`).
4. Challenges. What is no sum is left to chance: children of the best genomes are scored on growing parts of the rows,
   each as long as it is ahead of the incumbent. Four in five are dropped after a sixteenth of the rows, so this is
   cheap.
"""

import itertools
import math
from collections.abc import Generator, Iterable
from typing import NamedTuple

import numpy as np

from glora_llm.schema import SearchSection
from glora_llm.search.archive import SLOPE_SAMPLES
from glora_llm.search.halving import Evaluated, Rows, challenge, halve_finalists
from glora_llm.search.maximum import find_maximum
from glora_llm.search.space import Code, Space
from glora_llm.search.strategies import STRATEGIES, Ask, Strategy, Values
from glora_llm.search.surrogate import ChoiceTable, Observations, Surrogate

# Of `search.passes`; the rest is for halving and challenges.
SHARE_IMPORTANCE = 0.15
SHARE_SAMPLES = 0.4

# Sampling
ROUNDS = 8  # fits at most, each after an equal share of the samples
PARTS = 32  # the rows are cut into so many parts at most; a sample is scored on one of them
LEAST_ROWS = 3  # of a part
IMPORTANCE_PARTS = 16  # the same for first-order importance, of which each costs a backward pass
PROPOSALS = 3  # genomes after each fit
CHECKED = 0.125  # share of the parts on which they are scored beside the incumbent
MUTATED = 0.2  # share of the groups of slots that is drawn anew around the incumbent

# Halving
FINALISTS = 10
UNIFORM = 2  # of them, at most, with one path for all layers
HALVING_PASSES = 0.32  # for each finalist: an eighth of the rows, half as many finalists for each next part

# Challenges
CHILDREN = 8  # of one challenge
PARENTS = 4  # genomes scored on all rows that have children
CROSSED = 0.5  # share of the children that have two parents
BRED = 0.08  # share of the slots that is drawn anew in a child
SCREENED = 3  # children of which the surrogate model chooses one

SMALLER = (0.75, 0.5, 0.25)  # of the cost of the best proposal: genomes that are scored beside it for the Pareto front


class Problem(NamedTuple):
    """Genomes of a space within a limit, and the one generator of all that is random."""

    space: Space
    limit: float
    rng: np.random.Generator


@STRATEGIES.register("additive")
def search_additively(space: Space, settings: SearchSection, limit: float, rows: int) -> Strategy:
    """Fit a surrogate model to scores of parts of the rows; halve what it proposes; challenge the winner."""
    problem = Problem(space, limit, np.random.default_rng(settings.seed))
    order = problem.rng.permutation(rows)
    parts = _cut(order, max(1, min(PARTS, rows // LEAST_ROWS)))
    importance = yield from _measure_importance(
        problem, _cut(order, min(IMPORTANCE_PARTS, rows)), settings.passes * SHARE_IMPORTANCE
    )
    observations = Observations(space, importance)
    incumbents = yield from _sample(problem, observations, parts, settings.passes * SHARE_SAMPLES)

    surrogate = observations.fit()
    uniform = sorted(space.uniforms(limit), key=surrogate.predict)[-UNIFORM:]
    proposals = [*incumbents, *uniform, *_propose(problem, observations, surrogate)]
    smaller = _find_smaller(space, surrogate, space.cost(proposals[-1]))

    passes_left = settings.passes * (1 - SHARE_IMPORTANCE - SHARE_SAMPLES) - len(smaller)
    samples_left = round(passes_left) * rows
    affordable = round(samples_left / (HALVING_PASSES * rows))
    finalists = _unique(reversed(proposals))[: min(FINALISTS, max(2, affordable))]
    winner, used = yield from halve_finalists(finalists, order, ROUNDS)

    best, tried = [winner], {code.tobytes() for code in finalists}
    for generation in itertools.count(ROUNDS + 1):
        samples_left -= used
        children = _breed(problem, best, surrogate, tried) if samples_left >= 2 * rows else []
        if not children:
            break
        better, used = yield from challenge(children, best[0], problem.rng.permutation(rows), generation)
        best = sorted([*best, *better], key=lambda evaluated: -evaluated.score)[:PARENTS]
    yield Ask(smaller, np.arange(rows), generation)


def _cut(order: Rows, count: int) -> list[Rows]:
    """Cut rows into so many parts, each in ascending order."""
    return [np.sort(part) for part in np.array_split(order, count)]


def _measure_importance(problem: Problem, parts: list[Rows], passes: float) -> Generator[Ask, Values, ChoiceTable]:
    """Return the mean first-order importance of all choices, of random genomes on one part of the rows each."""
    count = max(1, round(passes / SLOPE_SAMPLES * len(parts)))
    mean = np.zeros(problem.space.parameters.shape)
    for number, part in enumerate(parts[:count]):
        codes = [problem.space.random(problem.rng, problem.limit) for _ in range(number, count, len(parts))]
        slopes = yield Ask(codes, part, 0, slopes=True)  # (genomes, G, C)
        mean += slopes.sum(0) / count
    return mean


def _sample(
    problem: Problem, observations: Observations, parts: list[Rows], passes: float
) -> Generator[Ask, Values, list[Code]]:
    """Score genomes on one part of the rows each: random ones, then around an incumbent that is chosen every round.

    Returns:
        the incumbents, one of each round but the first.
    """
    rounds = int(np.clip(round(passes / 2), 1, ROUNDS))
    passes_for_checks = rounds * CHECKED * (PROPOSALS + 1)
    asks = max(rounds, round(passes - passes_for_checks))  # each is one pass: a genome for every part
    incumbents: list[Code] = []
    for number in range(asks):
        turn, part = number * rounds // asks, number % len(parts)
        if turn > len(incumbents):
            incumbents.append((yield from _choose_incumbent(problem, observations, parts, incumbents[-1:], turn)))
        codes = [_draw(problem, incumbents) for _ in parts]
        values = yield Ask(codes, parts[part], turn)
        for code, score in zip(codes, values.mean(1), strict=True):
            observations.add(code, part, float(score))
    return incumbents


def _draw(problem: Problem, incumbents: list[Code]) -> Code:
    """Draw a genome that differs from the incumbent, or from a random one, in something that many layers share."""
    space, limit, rng = problem
    if incumbents:
        return space.mutate_alike(incumbents[-1], rng, limit, MUTATED)
    return space.mutate_alike(space.random(rng, limit), rng, limit, 1.0)


def _choose_incumbent(
    problem: Problem, observations: Observations, parts: list[Rows], before: list[Code], turn: int
) -> Generator[Ask, Values, Code]:
    """Return the best of the proposals and of the incumbent before, on a few parts of the rows."""
    codes = _unique([*_propose(problem, observations, observations.fit()), *before])
    scores = np.zeros(len(codes))
    checked = problem.rng.choice(len(parts), math.ceil(CHECKED * len(parts)), replace=False)
    for part in checked:
        values = (yield Ask(codes, parts[part], turn)).mean(1)
        scores += values
    for code, score in zip(codes, values, strict=True):  # of the last part
        observations.add(code, int(part), float(score))
    return codes[int(scores.argmax())]


def _propose(problem: Problem, observations: Observations, surrogate: Surrogate) -> list[Code]:
    """Return the best genomes of three fits: to half of the samples, without the parabola, and the one given."""
    count = len(observations.scores)
    half = problem.rng.choice(count, min(count, max(2, count // 2)), replace=False)
    surrogates = (observations.fit(half), observations.fit(with_curve=False), surrogate)
    return [find_maximum(problem.space, fitted, problem.limit) for fitted in surrogates]


def _find_smaller(space: Space, surrogate: Surrogate, cost: float) -> list[Code]:
    """Return the best genomes at shares of a cost: the rest of the Pareto front."""
    least = space.costs.min(1).sum()
    return [find_maximum(space, surrogate, max(least, cost * share)) for share in SMALLER]


def _breed(problem: Problem, best: list[Evaluated], surrogate: Surrogate, tried: set[bytes]) -> list[Code]:
    """Return up to CHILDREN children that were not tried yet, each the surrogate model's choice of SCREENED."""
    space, limit, rng = problem
    children = list[Code]()
    for _ in range(20 * CHILDREN):
        if len(children) == CHILDREN:
            break
        screened = []
        for _ in range(SCREENED):
            one, other = (best[rng.integers(len(best))].code for _ in range(2))
            parent = space.cross(one, other, rng, limit) if rng.random() < CROSSED else one
            screened.append(space.mutate(parent, rng, limit, BRED))
        child = max(screened, key=surrogate.predict)
        if child.tobytes() not in tried:
            tried.add(child.tobytes())
            children.append(child)
    return children


def _unique(codes: Iterable[Code]) -> list[Code]:
    return list({code.tobytes(): code for code in codes}.values())
