"""The rows of an optimizer step: a pure function of the step, whatever the number of processes."""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from glora_llm.errors import UserError


def permutation(n: int, *seeds: int) -> NDArray[np.int64]:
    """Return the numbers 0 to n-1 in an order that depends on `seeds` alone.

    Raw words of PCG64 are sorted: NumPy keeps that stream the same from version to version, but not `permutation`.
    """
    words = np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64)


class GlobalSampler:
    """The endless sequence of epochs, cut into optimizer steps.

    Epoch e is the permutation of (seed, e); step s takes positions [s G, (s+1) G) of all epochs one after the other,
    so a resumed run, on any number of processes, goes on with the rows that come next.

    Args:
        n_rows: rows of the training set.
        global_batch: G, rows of one optimizer step over all processes.
        seed: of the order.

    Raises:
        UserError: when there are no rows, or G is not positive.
    """

    def __init__(self, n_rows: int, global_batch: int, seed: int):
        if n_rows < 1 or global_batch < 1:
            raise UserError(f"Cannot draw batches of {global_batch} rows from {n_rows} rows: both must be at least 1")
        self.n_rows = n_rows
        self.global_batch = global_batch
        self.seed = seed
        self._epoch = lru_cache(maxsize=2)(lambda epoch: permutation(n_rows, seed, epoch))

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps of one pass over the rows; not rounded, as a step may reach into the next epoch."""
        return self.n_rows / self.global_batch

    def steps_for(self, epochs: float) -> int:
        """Return the number of optimizer steps that pass over the rows at least `epochs` times."""
        return max(1, math.ceil(round(epochs * self.steps_per_epoch, 9)))

    def step_rows(self, step: int) -> list[int]:
        """Return the G rows of optimizer step `step` (from 0), in order."""
        first = step * self.global_batch
        places = (divmod(position, self.n_rows) for position in range(first, first + self.global_batch))
        return [int(self._epoch(epoch)[place]) for epoch, place in places]

    def process_rows(self, step: int, process_rank: int, world_size: int, micro_batch: int) -> list[list[int]]:
        """Return the micro batches of one process, one list of rows for each accumulation step.

        Micro batch k of process p holds rows [(k world_size + p) micro, (k world_size + p + 1) micro) of the step.

        Raises:
            UserError: when G is not micro_batch x accumulation x processes.
        """
        together = micro_batch * world_size
        if self.global_batch % together:
            below = self.global_batch // together * together
            fitting = f"{below} or {below + together}" if below else f"{together}"
            raise UserError(
                f"training.global_batch {self.global_batch} is not micro_batch {micro_batch} x accumulation x "
                f"{world_size} processes: the nearest that fit are multiples of {together}: {fitting}."
            )
        rows = self.step_rows(step)
        starts = range(process_rank * micro_batch, self.global_batch, together)
        return [rows[start : start + micro_batch] for start in starts]
