"""Successive halving: score genomes on growing parts of the rows, and drop those that are behind after each part."""

from collections.abc import Callable, Generator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glora_llm.search.space import Code
from glora_llm.search.strategies import Ask, Values

Rows = NDArray[np.int64]  # numbers of rows
FIRST_PART_OF_FINAL = 8  # the finalists are first scored on so small a part of the rows
FIRST_PART_OF_CHALLENGE = 16  # the challengers of an incumbent are first scored on so small a part
SURELY_WORSE = 2.0  # standard errors of the paired difference to the best at which a finalist is dropped


class Evaluated(NamedTuple):
    """A genome that is scored on all rows.

    Attributes:
        score: mean over all rows.
        code: of the genome.
        rows: score of each row, in the order of the rows' numbers.
    """

    score: float
    code: Code
    rows: NDArray[np.float64]


def halve_finalists(
    finalists: list[Code], order: Rows, generation: int
) -> Generator[Ask, Values, tuple[Evaluated, int]]:
    """Halve the finalists on doubling parts of the rows, until one is best on all of them.

    Of each half that goes on, those are dropped too that are surely worse than the best, row by row.

    Returns:
        the best genome, and the row scores that this cost.
    """

    def keep(scores: Values) -> list[int]:
        behind_best = scores[scores.mean(1).argmax()] - scores  # (genomes, rows), paired by row
        rows = behind_best.shape[1]
        one_row = np.full(len(scores), np.inf)  # nothing is sure of it
        standard_error = behind_best.std(1, ddof=1) / np.sqrt(rows) if rows > 1 else one_row
        best_first = np.argsort(-scores.mean(1), kind="stable")
        better_half = best_first[: max(2, len(scores) // 2)]
        return [i for i in better_half if behind_best[i].mean() <= SURELY_WORSE * standard_error[i]]

    survivors, used = yield from _score_growing_parts(
        finalists, order, len(order) // FIRST_PART_OF_FINAL, generation, keep
    )
    return survivors[0], used


def challenge(
    challengers: list[Code], incumbent: Evaluated, order: Rows, generation: int
) -> Generator[Ask, Values, tuple[list[Evaluated], int]]:
    """Score challengers on doubling parts of the rows, each as long as it is ahead of the incumbent on them.

    Returns:
        those that are ahead on all rows, and the row scores that this cost.
    """

    def keep(scores: Values) -> list[int]:
        same_rows = order[: scores.shape[1]]
        return list(np.flatnonzero(scores.mean(1) > incumbent.rows[same_rows].mean()))

    first = len(order) // FIRST_PART_OF_CHALLENGE
    return (yield from _score_growing_parts(challengers, order, first, generation, keep))


def _score_growing_parts(
    codes: list[Code], order: Rows, first: int, generation: int, keep: Callable[[Values], list[int]]
) -> Generator[Ask, Values, tuple[list[Evaluated], int]]:
    """Score genomes on the first rows of an order, drop some, double the rows, go on.

    Args:
        first: rows of the first part, two at least.
        keep: scores so far, (genomes, rows) -> the genomes that go on, in their order from here on.

    Returns:
        those that are left after all rows, and the row scores that this cost.
    """
    done, end, used = 0, max(2, first), 0
    scores = np.zeros((len(codes), 0))
    while codes and done < len(order):
        part = order[done:end]
        scores = np.hstack([scores, (yield from _score(codes, part, generation))])
        used += len(codes) * len(part)
        kept = keep(scores)
        codes, scores = [codes[index] for index in kept], scores[kept]
        done, end = end, min(len(order), 2 * end)
    return [_evaluated(code, order, row) for code, row in zip(codes, scores, strict=True)], used


def _score(codes: list[Code], rows: Rows, generation: int) -> Generator[Ask, Values, Values]:
    """Ask for the scores of rows in any order; return them in that order."""
    ascending = np.argsort(rows)
    values = yield Ask(codes, rows[ascending], generation)
    return values[:, np.argsort(ascending)]


def _evaluated(code: Code, order: Rows, scores: NDArray[np.float64]) -> Evaluated:
    """Return a genome with its scores put into the order of the rows' numbers."""
    rows = np.empty(len(order))
    rows[order] = scores
    return Evaluated(float(rows.mean()), code, rows)
