"""Token sets on disk: flat arrays, memory-mapped when read."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glora_llm.data.tokenize import Mask, Sample, Tokens


class Row(NamedTuple):
    """One row: a sample, or several with packing.

    Attributes:
        tokens: (T) int32.
        targets: (T) bool, True where the token is learnt.
        starts: index of the first token of each sample.
    """

    tokens: Tokens
    targets: Mask
    starts: list[int]


class RowSet:
    """The common base of the rows of a split: their role, and a seal.

    Args:
        role: what the rows are for.
        name: for messages; `train`, say.
    """

    def __init__(self, role: str, name: str):
        self.role = role
        self.name = name
        self._sealed = ""

    @contextlib.contextmanager
    def sealed(self, why: str) -> Iterator[None]:
        """Let every read of a row fail, while something is chosen that these rows will judge."""
        self._sealed = why
        try:
            yield
        finally:
            self._sealed = ""

    def _require_row(self, i: int, count: int) -> None:
        """Check that row `i` of `count` may be read."""
        if self._sealed:
            raise RuntimeError(f"the {self.role} rows were read while {self._sealed}")
        if not 0 <= i < count:
            raise IndexError(f"row {i} of '{self.name}', which has rows 0 to {count - 1}")


class TokenSet(RowSet):
    """The rows of one split, read from disk as they are asked for.

    Args:
        folder: what `write_set` wrote.
        role: what the rows are for.
        name: for messages; `train`, say.
    """

    def __init__(self, folder: Path, role: str, name: str):
        super().__init__(role, name)
        self._tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self._targets = np.load(folder / "targets.npy", mmap_mode="r")
        self._samples = np.load(folder / "samples.npy")
        self._rows = np.load(folder / "rows.npy")

    def __len__(self) -> int:
        return len(self._rows) - 1

    def row(self, i: int) -> Row:
        """Return row `i`, counted from 0.

        Raises:
            IndexError: when there is no such row.
            RuntimeError: when the rows are sealed.
        """
        self._require_row(i, len(self))
        bounds = self._samples[self._rows[i] : self._rows[i + 1] + 1]
        first, last = int(bounds[0]), int(bounds[-1])
        starts = [int(start) - first for start in bounds[:-1]]
        return Row(np.asarray(self._tokens[first:last]), np.asarray(self._targets[first:last]), starts)

    def digest(self) -> str:
        """Return a SHA-256 over all tokens and targets in row order: what a run was trained on."""
        found = hashlib.sha256()
        for array in (self._tokens, self._targets, self._samples, self._rows):
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()

    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of every row."""
        lengths: NDArray[np.int64] = np.diff(self._samples[self._rows])
        return lengths


def write_set(folder: Path, samples: Sequence[Sample], rows: Sequence[Sequence[int]]) -> None:
    """Write the samples, in the order of `rows`, as four arrays into the new folder `folder`.

    tokens (N) int32 and targets (N) bool of all samples, end to end; samples (S + 1): where each begins in them;
    rows (R + 1): the first sample of each row.
    """
    folder.mkdir(parents=True)
    order = [number for row in rows for number in row]
    lengths = [len(samples[number].tokens) for number in order]
    np.save(folder / "tokens.npy", np.concatenate([samples[n].tokens for n in order]).astype(np.int32))
    np.save(folder / "targets.npy", np.concatenate([samples[n].targets for n in order]))
    np.save(folder / "samples.npy", np.cumsum([0, *lengths], dtype=np.int64))
    np.save(folder / "rows.npy", np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64))
