"""Progress of a command: a bar on a terminal, else a line every five seconds at most."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from glora_llm.training.metric_log import SECONDS_BETWEEN_LINES

Item = TypeVar("Item")


class Progress:
    """Counts what is done.

    Args:
        total: how much there is to do.
        title: what it is; empty: nothing is shown.
        unit: what is counted.

    Attributes:
        done: how much is done.
    """

    def __init__(self, total: int, title: str, unit: str):
        self.total, self.title, self.unit, self.done = total, title, unit, 0
        self.prints = bool(title) and not sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=title, unit=unit, disable=self.prints or not title, leave=False)
        self.last_line = time.monotonic()

    def update(self) -> None:
        """Count one more; after the last one, begin again."""
        if self.done == self.total:
            self.done = 0
            self.bar.reset()
        self.done += 1
        self.bar.update()
        now = time.monotonic()
        if self.prints and now - self.last_line >= SECONDS_BETWEEN_LINES:
            print(f"{self.title}: {self.done} of {self.total} {self.unit}s", flush=True)
            self.last_line = now

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()


def progress(items: Sequence[Item], title: str, unit: str) -> Iterator[Item]:
    """Yield the items, and show how many are done."""
    shown = Progress(len(items), title, unit)
    try:
        for item in items:
            yield item
            shown.update()
    finally:
        shown.close()
