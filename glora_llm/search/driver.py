"""Run a search strategy: answer its questions from the journal or by the scorer, on one process or on all."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

import glora_llm.search.additive  # noqa: F401 - registers itself
from glora_llm.errors import UserError
from glora_llm.glora.path import Genome
from glora_llm.schema import SearchSection
from glora_llm.search.archive import SLOPE_SAMPLES, Journal, Scored, best
from glora_llm.search.space import Code, Space
from glora_llm.search.strategies import STRATEGIES, Ask, Strategy

Rows = NDArray[np.int64]
WORST = -1e6  # the score of a row whose loss is not finite: no such genome wins


class Scorer(Protocol):
    """Scores genomes on rows, dividing the work among the processes as it sees fit."""

    at_once: int  # genomes that are scored side by side

    def __call__(self, requests: Sequence[tuple[Genome, Rows]]) -> list[NDArray[np.float64]]:
        """Return the scores of each request's rows, the same on all processes; all must call it together."""
        ...

    def slopes(self, requests: Sequence[tuple[Genome, Rows]]) -> list[NDArray[np.float64]]:
        """Return the first-order importance of each choice of each gene, by the mean score of a request's rows."""
        ...

    def agree(self, text: str) -> bool:
        """Tell whether all processes gave the same text."""
        ...


class Progress(NamedTuple):
    """The state of a search after a question of its strategy."""

    generation: int
    best: float  # score of the best candidate that is scored on all rows; -inf before the first
    mean: float  # of what was scored in this question
    samples: int  # forward passes of single rows of this search, those known from a journal included; slopes count too
    candidates: int  # scored on all rows


@dataclass
class Found:
    """The result of a search."""

    candidates: list[Scored] = field(default_factory=list)
    samples: int = 0  # rows scored, each genome and row once; a row of slopes counts SLOPE_SAMPLES
    seconds: float = 0.0  # of scoring in this launch
    history: list[Progress] = field(default_factory=list)

    @property
    def best(self) -> Scored:
        """The candidate of the highest score on all rows."""
        return best(self.candidates)


def search(
    space: Space,
    settings: SearchSection,
    limit: float,
    scorer: Scorer,
    journal: Journal,
    tell: Callable[[Progress], None] = lambda _: None,
) -> Found:
    """Search for the best genome within a limit.

    Args:
        limit: in the unit of the space's costs.
        journal: scores known so far; it decides how many rows there are.
        tell: is called after every question of the strategy.

    Raises:
        UserError: when processes ask different questions.
    """
    found, seen, counted = Found(), set[bytes](), dict[bytes, set[int]]()
    strategy = STRATEGIES.get(settings.strategy)(space, settings, limit, journal.rows)
    began, ask = time.perf_counter(), next(strategy, None)
    while ask is not None:
        _require_same(ask, scorer)
        if ask.slopes:
            found.samples += SLOPE_SAMPLES * len(ask.rows) * len({code.tobytes() for code in ask.codes})
            ask = _next(strategy, _slopes(ask, space, scorer, journal))
            continue
        values = _answer(ask, space, scorer, journal)
        for code in ask.codes:
            rows = counted.setdefault(code.tobytes(), set())
            found.samples += len(set(ask.rows.tolist()) - rows)
            rows.update(ask.rows.tolist())
            score = journal.score(code) if len(rows) == journal.rows else None
            if score is not None and code.tobytes() not in seen:
                seen.add(code.tobytes())
                found.candidates.append(Scored(code, score, space.size(code), space.cost(code), ask.generation))
        top = best(found.candidates).score if found.candidates else -np.inf
        progress = Progress(ask.generation, top, float(values.mean()), found.samples, len(found.candidates))
        found.history.append(progress)
        tell(progress)
        ask = _next(strategy, values)
    found.seconds = time.perf_counter() - began
    return found


def _next(strategy: Strategy, values: NDArray[np.float64]) -> Ask | None:
    try:
        return strategy.send(values)
    except StopIteration:
        return None


def _answer(ask: Ask, space: Space, scorer: Scorer, journal: Journal) -> NDArray[np.float64]:
    """Score the rows that the journal does not know yet, and return the scores (candidates, rows)."""
    unknown: dict[bytes, tuple[Code, Rows]] = {}
    for code in ask.codes:
        rows = journal.missing(code, ask.rows)
        if len(rows):
            unknown[code.tobytes()] = (code, rows)
    todo = list(unknown.values())
    for start in range(0, len(todo), scorer.at_once):
        group = todo[start : start + scorer.at_once]
        for (code, rows), values in zip(group, scorer([(space.genome(c), r) for c, r in group]), strict=True):
            journal.record(code, rows, np.nan_to_num(values, nan=WORST, posinf=WORST, neginf=WORST))
    return np.array([journal.get(code, ask.rows) for code in ask.codes])


def _slopes(ask: Ask, space: Space, scorer: Scorer, journal: Journal) -> NDArray[np.float64]:
    """Take the slopes that the journal does not know yet, and return all of them (candidates, G, C)."""
    codes = {code.tobytes(): code for code in ask.codes}
    todo = [code for code in codes.values() if journal.slopes_of(code, ask.rows) is None]
    for start in range(0, len(todo), scorer.at_once):
        group = todo[start : start + scorer.at_once]
        for code, slopes in zip(group, scorer.slopes([(space.genome(c), ask.rows) for c in group]), strict=True):
            journal.record_slopes(code, ask.rows, np.nan_to_num(slopes, posinf=0.0, neginf=0.0))
    known = [journal.slopes_of(code, ask.rows) for code in ask.codes]
    return np.array([space.table(slopes) for slopes in known if slopes is not None])


def _require_same(ask: Ask, scorer: Scorer) -> None:
    text = b"".join(code.tobytes() for code in ask.codes) + ask.rows.tobytes() + bytes([ask.slopes])
    if not scorer.agree(hashlib.sha256(text).hexdigest()):
        raise UserError(
            "The processes of this search disagree on the next candidates: they do not run the same recipe or the same "
            "version. Nothing is lost: start all of them again in the same way."
        )
