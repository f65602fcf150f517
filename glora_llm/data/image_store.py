"""Image sets on disk: one array of pixels for each source, memory-mapped, and the rows of it that a split has."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glora_llm.data.image_decode import Pixels
from glora_llm.data.sources import Role
from glora_llm.data.store import RowSet

AT_ONCE = 1024  # images whose pixels are read at a time


class ImageRow(NamedTuple):
    """One image.

    Attributes:
        pixels: (H, W, 3) uint8.
        label: number of its class.
    """

    pixels: Pixels
    label: int


class ImageSet(RowSet):
    """The images of one split, read from disk as they are asked for.

    Args:
        folder: what `write_rows` wrote.
        pixels: file of the pixels (N, H, W, 3) uint8 that its rows point into.
        role: what the images are for.
    """

    def __init__(self, folder: Path, pixels: Path, role: Role):
        super().__init__(role, role)
        self._pixels = np.load(pixels, mmap_mode="r")
        self._rows = np.load(folder / "rows.npy")
        self.labels: NDArray[np.int64] = np.load(folder / "labels.npy")

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def size(self) -> int:
        """Side of the square images, in pixels."""
        return int(self._pixels.shape[1])

    def row(self, i: int) -> ImageRow:
        """Return image `i`, counted from 0.

        Raises:
            IndexError: when there is no such image.
            RuntimeError: when the images are sealed.
        """
        self._require_row(i, len(self))
        return ImageRow(np.asarray(self._pixels[self._rows[i]]), int(self.labels[i]))

    def digest(self) -> str:
        """Return a SHA-256 over all pixels and labels in row order: what a run was trained on."""
        found = hashlib.sha256(np.ascontiguousarray(self.labels).data)
        for pixels in self._pieces():
            found.update(np.ascontiguousarray(pixels).data)
        return found.hexdigest()

    def lengths(self) -> NDArray[np.int64]:
        """Return 1 for every image: all cost the same."""
        return np.ones(len(self), dtype=np.int64)

    def moments(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation of red, green and blue over all pixels, of 0 to 1."""
        total, squares, count = np.zeros(3), np.zeros(3), 0
        for pixels in self._pieces():
            scaled = pixels.reshape(-1, 3) / 255
            total, squares, count = total + scaled.sum(0), squares + (scaled**2).sum(0), count + len(scaled)
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 1e-6))
        return mean.round(6).tolist(), std.round(6).tolist()

    def _pieces(self) -> Iterator[Pixels]:
        for start in range(0, len(self), AT_ONCE):
            yield self._pixels[self._rows[start : start + AT_ONCE]]


def write_rows(folder: Path, rows: Sequence[int], labels: Sequence[int]) -> None:
    """Write which images of a source a split has, and their labels, into the new folder `folder`."""
    folder.mkdir(parents=True)
    np.save(folder / "rows.npy", np.array(rows, dtype=np.int64))
    np.save(folder / "labels.npy", np.array(labels, dtype=np.int64))
