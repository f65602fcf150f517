"""Forked trials of the benchmarks, side by side, ended together."""

import signal
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from glora_llm.compare.pool import Pool, in_parallel, slots

DIVERGED = "had a loss or gradient that is not finite"  # what a run says that ends so
R = TypeVar("R")


def train_all(train_one: Callable[[Pool, R], None], runs: Sequence[R], jobs: int | None) -> None:
    """Train runs in the slots of a pool; SIGTERM ends them as Ctrl-C does.

    Args:
        train_one: trains one run in the pool.
        jobs: trials at once; None: one a core.

    Raises:
        KeyboardInterrupt, Ending: told to end; the runs have written a checkpoint.
    """
    if not runs:
        return
    pool = Pool(slots(jobs))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pool.ended_with_this():
            in_parallel(partial(train_one, pool), runs)
    finally:
        signal.signal(signal.SIGTERM, before)
