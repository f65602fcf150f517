"""A line for each trial that begins or ends, with an estimate of the time that is left."""

import threading
import time


class Progress:
    """Counts the training steps of a comparison.

    Args:
        planned: training steps of all trials, as far as they are known.
        jobs: trials at once.

    Attributes:
        reached: name of a trial -> steps that it has done.
        trained, seconds: steps that trials did in this launch, and the seconds of their processes.
    """

    def __init__(self, planned: int, jobs: int):
        self.planned, self.jobs = planned, jobs
        self.reached: dict[str, int] = {}
        self.trained, self.seconds = 0, 0.0
        self.lock = threading.Lock()

    def begin(self, name: str) -> None:
        """Say that a trial begins."""
        print(f"{time.strftime('%H:%M:%S')} {name} begins", flush=True)

    def reuse(self, name: str, step: int) -> None:
        """Count a trial that had reached a step before."""
        with self.lock:
            self.reached[name] = max(step, self.reached.get(name, 0))

    def end(self, name: str, steps: tuple[int, int], seconds: float, outcome: str) -> None:
        """Say how a trial ended.

        Args:
            steps: from which to which it trained.
            seconds: of its process.
        """
        with self.lock:
            self.reached[name] = steps[1]
            self.trained, self.seconds = self.trained + max(0, steps[1] - steps[0]), self.seconds + seconds
            print(f"{time.strftime('%H:%M:%S')} {name} {outcome}, {seconds:.0f} s{self._left()}", flush=True)

    def _left(self) -> str:
        left = self.planned - sum(self.reached.values())
        if left <= 0 or self.trained <= 0:
            return ""
        return f"; about {_time(left * self.seconds / self.trained / self.jobs)} left"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
