"""Token sets on disk: flat arrays, memory-mapped when read."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glora_llm.data.sample import Mask, Sample, Tokens

TEXT_BYTES = "text_bytes.npy"


class Row(NamedTuple):
    """One row: a sample, or several with packing.

    Attributes:
        tokens: (T) int32.
        targets: (T) bool, True where the token is learnt.
        starts: index of the first token of each sample, or of each option's sequence.
        right: of held-out multiple choice, the number of the right option, from 0; else -1.
        option_lengths: characters of each option; else empty.
        label: of a classification the class number, of a regression the number, of the first sample; else None.
    """

    tokens: Tokens
    targets: Mask
    starts: list[int]
    right: int = -1
    option_lengths: tuple[int, ...] = ()
    label: float | None = None


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

    def text_bytes(self) -> NDArray[np.int64] | None:
        """Return the UTF-8 bytes of the raw text that the targets of every row stand for; None: rows are no such text.

        Only held-out rows of running text know them.
        """
        return None

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
        has_options = (folder / "right.npy").is_file()
        self._right = np.load(folder / "right.npy") if has_options else None
        self._option_lengths = np.load(folder / "option_lengths.npy") if has_options else None
        self._text_bytes = np.load(folder / TEXT_BYTES) if (folder / TEXT_BYTES).is_file() else None
        labels = folder / "labels.npy"
        self._labels = np.load(labels) if labels.is_file() else None

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
        row = Row(np.asarray(self._tokens[first:last]), np.asarray(self._targets[first:last]), starts)
        if self._labels is not None:
            row = row._replace(label=float(self._labels[i]))
        if self._right is None or self._option_lengths is None:
            return row
        lengths = self._option_lengths[self._rows[i] : self._rows[i + 1]].tolist()
        return row._replace(right=int(self._right[i]), option_lengths=tuple(lengths))

    def digest(self) -> str:
        """Return a SHA-256 over all tokens and targets in row order: what a run was trained on.

        Labels count where they are not among the tokens.
        """
        found = hashlib.sha256()
        arrays = [self._tokens, self._targets, self._samples, self._rows]
        if self._labels is not None and not self._targets.any():
            arrays.append(self._labels)
        for array in arrays:
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()

    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of every row."""
        lengths: NDArray[np.int64] = np.diff(self._samples[self._rows])
        return lengths

    def text_bytes(self) -> NDArray[np.int64] | None:
        """Return the UTF-8 bytes of the raw text that the targets of every row stand for, of held-out running text."""
        return self._text_bytes


def write_set(
    folder: Path, samples: Sequence[Sample], rows: Sequence[Sequence[int]], classes: Sequence[str] | None = None
) -> None:
    """Write the samples, in the order of `rows`, as arrays into the new folder `folder`.

    tokens (N) int32 and targets (N) bool of all samples, end to end; samples (S + 1): where each begins in them;
    rows (R + 1): the first sample of each row.

    Of held-out multiple choice S counts the options, and there are two more: right (R), option_lengths (S). Of
    classification and regression there is one more, labels (R): the class number, or the number, of the first sample.
    Of held-out running text there is text_bytes (R): the UTF-8 bytes that the targets of a row stand for.

    Args:
        classes: label words by class number.
    """
    folder.mkdir(parents=True)
    order = [number for row in rows for number in row]
    pieces = [_lengths(samples[number]) for number in order]
    np.save(folder / "tokens.npy", np.concatenate([samples[n].tokens for n in order]).astype(np.int32))
    np.save(folder / "targets.npy", np.concatenate([samples[n].targets for n in order]))
    np.save(folder / "samples.npy", np.cumsum([0, *chain(*pieces)], dtype=np.int64))
    counts = [sum(len(_lengths(samples[number])) for number in row) for row in rows]
    np.save(folder / "rows.npy", np.cumsum([0, *counts], dtype=np.int64))
    options = [spans for n in order if (spans := samples[n].options) is not None]
    if options:
        np.save(folder / "right.npy", np.array([spans.right for spans in options], dtype=np.int64))
        np.save(folder / "option_lengths.npy", np.array([*chain(*(spans.lengths for spans in options))]))
    if samples and samples[0].text_bytes is not None:
        np.save(folder / TEXT_BYTES, np.array([sum(_target_bytes(samples[n]) for n in row) for row in rows]))
    first = [samples[row[0]].label for row in rows]
    if first and first[0] is not None:
        numbers = {word: number for number, word in enumerate(classes or ())}
        labels = [numbers[label] if isinstance(label, str) else label for label in first]
        np.save(folder / "labels.npy", np.array(labels, dtype=np.float64))


def _target_bytes(sample: Sample) -> int:
    return 0 if sample.text_bytes is None else int(sample.text_bytes[sample.targets].sum())


def _lengths(sample: Sample) -> list[int]:
    """Return the tokens of a sample, or of each of its options."""
    if sample.options is None:
        return [len(sample.tokens)]
    lengths: list[int] = np.diff([*sample.options.starts, len(sample.tokens)]).tolist()
    return lengths
