"""A race: methods train side by side, the worse half of them stops at some validations, and the winner is tested."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from glora_llm.compare.course import Course, Setting
from glora_llm.compare.outcome import NotRun, Outcome
from glora_llm.compare.pool import in_parallel
from glora_llm.compare.table import Contest
from glora_llm.compare.trial import Trial
from glora_llm.errors import UserError


def rungs(methods: int, steps: int, every: int) -> list[int]:
    """Return the validations at which half of the methods stops: near 1/2 of the steps, 1/4 before it, and so on.

    Where validations are too rare for all halvings, more than one method gets to the end.

    Args:
        methods: how many begin.
        steps: of a run.
        every: steps between two validations.
    """
    found: list[int] = []
    for left in range(math.ceil(math.log2(methods)), 0, -1):
        rung = max(every, steps // 2**left // every * every, found[-1] + every if found else 0)
        if rung < steps:
            found.append(rung)
    return found


def require_rungs(methods: int, steps: int, every: int) -> None:
    """Check that there is a validation before the end.

    Raises:
        UserError: where there is none.
    """
    if methods > 1 and not rungs(methods, steps, every):
        raise UserError(
            f"--race stops methods at validations, and evaluation.every={every} has none before step {steps}, the "
            f"last. Set evaluation.every to {max(1, steps // 6)}, say, or training.steps to more."
        )


def planned(rates: Sequence[int], steps: int, every: int, seeds: int) -> int:
    """Return about how many steps a race trains in all.

    Args:
        rates: how many rates each method begins with.
    """
    left, before, total = sorted(rates), 0, 0
    for rung in rungs(len(left), steps, every) if left else ():
        total += sum(left) * (rung - before)
        left, before = [-(-count // 2) for count in left[: -(-len(left) // 2)]], rung
    return total + sum(left) * (steps - before) + (seeds - 1) * steps


@dataclass
class Racer:
    """A method in a race.

    Attributes:
        contest: its part in the comparison, which is told when and where it stopped.
        course: runs its trials.
        trials: of the first seed, one a rate: those that still train.
        found: its scores so far.
    """

    contest: Contest
    course: Course
    trials: list[Trial]
    found: Outcome

    @classmethod
    def of(cls, contest: Contest, course: Course) -> "Racer":
        """Return a method at the start, at all its rates."""
        seed = course.setting.seeds[0]
        return cls(contest, course, [course.make(lr, seed) for lr in sorted(contest.rates)], Outcome())

    def reach(self, rung: int) -> None:
        """Train to a step; of several rates the better half goes on."""
        self.trials = self.course.reach(self.trials, rung, self.found)

    def finish(self) -> None:
        """Train to the end."""
        self.course.finish(self.trials, self.found)

    def test(self) -> None:
        """Train all seeds at the best rate, and score the test rows."""
        self.contest.outcome = self.course.test(self.found)

    def place(self) -> float:
        """Return a number that is smaller for a better method: of its best rate so far."""
        setting, found = self.course.setting, self.found
        score = found.rates.get(found.lr, found.stopped.get(found.lr))
        return math.inf if score is None else setting.better(score, setting.choice)

    def stop(self, step: int) -> None:
        """Leave the race after a step."""
        self.contest.stopped_at, self.contest.outcome = step, self.found


class Race:
    """Runs the methods against each other.

    Args:
        setting: of the comparison.
        racers: the methods, in the order of --methods, by which equal ones are placed.
        steps: of a whole run.
        write: called when something is known.
    """

    def __init__(self, setting: Setting, racers: Sequence[Racer], steps: int, write: Callable[[], None]):
        self.setting, self.racers, self.steps, self.write = setting, list(racers), steps, write

    def run(self) -> None:
        """Train, stop the worse half at each rung, and test the winner.

        Raises:
            Ending: when the comparison is told to end.
        """
        going = self.racers
        for rung in rungs(len(going), self.steps, self.setting.every):
            going = self._stop(self._all(lambda racer, rung=rung: racer.reach(rung), going), rung, None)  # type: ignore[misc]
        if len(going) > 1 or any(len(racer.trials) > 1 for racer in going):
            going = self._stop(self._all(Racer.finish, going), self.steps, 1)
        else:
            for racer in going:
                racer.found.lr = racer.trials[0].lr
        self._all(Racer.test, going)

    def _all(self, work: Callable[[Racer], None], racers: Sequence[Racer]) -> list[Racer]:
        """Do something for all at once, and return those that it was possible for."""

        def one(racer: Racer) -> None:
            try:
                work(racer)
            except NotRun as error:
                racer.contest.why, racer.contest.is_defect = str(error), error.is_defect
            except BaseException:
                racer.course.pool.end()
                raise

        in_parallel(one, racers)
        self.write()
        return [racer for racer in racers if not racer.contest.why]

    def _stop(self, racers: Sequence[Racer], step: int, kept: int | None) -> list[Racer]:
        """Stop the worse ones, and return those that go on.

        Args:
            kept: how many; None: the better half.
        """
        order = sorted(racers, key=Racer.place)  # stable
        kept = math.ceil(len(order) / 2) if kept is None else kept
        for racer in order[kept:]:
            racer.stop(step)
        names = [[racer.contest.contender.name for racer in part] for part in (order[:kept], order[kept:])]
        if names[1]:
            print(f"step {step}: on: {', '.join(names[0])}; stopped: {', '.join(names[1])}", flush=True)
        self.write()
        return order[:kept]
