"""Interleaved timing for benchmarks of speed, and ratios within a round."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping

Times = dict[str, list[float]]


def interleaved(
    steps: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> Times:
    """Return seconds of every run by name; each round runs everything once, and the first round is left out.

    So a noisy machine disturbs all alike.
    """
    times: Times = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            gc.collect()
            began = clock()
            step()
            if turn:
                times[name].append(clock() - began)
    return times


def ratio(times: Times, name: str, reference: str) -> float:
    """Return the median over rounds of time(name) / time(reference)."""
    return statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True))
