"""The result of the trials of one method."""

import math
from dataclasses import dataclass, field

from glora_llm.compare.trial import Result


class NotRun(Exception):
    """A method cannot be compared; the message says why.

    Args:
        is_defect: a trial failed in a way that neither the user nor the method causes.
    """

    def __init__(self, why: str, is_defect: bool = False):
        super().__init__(why)
        self.is_defect = is_defect


@dataclass
class Outcome:
    """The result of one method: its best rate, and the runs at it.

    Attributes:
        lr: the best rate.
        rates: rate -> validation score at the end of the first seed's run.
        stopped: rate -> validation score where it was stopped; None: it diverged.
        is_at_edge: the best rate is the lowest or highest that was tried.
        finals: results at the best rate, one a seed.
    """

    lr: float = math.nan
    rates: dict[float, float] = field(default_factory=dict)
    stopped: dict[float, float | None] = field(default_factory=dict)
    is_at_edge: bool = False
    finals: list[Result] = field(default_factory=list)

    def diverged(self) -> str:
        """Return that no rate is left, in words; a rate that was stopped with a score did not diverge."""
        gone = [rate_text(lr) for lr, score in self.stopped.items() if score is None]
        stopped = [rate_text(lr) for lr, score in self.stopped.items() if score is not None]
        which = f"that went on: {', '.join(gone)}; stopped before: {', '.join(stopped)}"
        return f"it diverged at every rate {which if stopped else 'that was tried: ' + ', '.join(gone)}"

    def beyond(self) -> float | None:
        """Return the rate beyond the best one, a step of the grid farther, where that is the lowest or highest."""
        tried = sorted([*self.rates, *self.stopped])
        if len(tried) < 2 or self.lr not in (tried[0], tried[-1]):
            return None
        neighbour = tried[1] if self.lr == tried[0] else tried[-2]
        return float(f"{self.lr * self.lr / neighbour:.2g}")


def rate_text(lr: float) -> str:
    """Return a rate as it is written: 1e-3, 2.5e-4."""
    mantissa, _, exponent = f"{lr:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"
