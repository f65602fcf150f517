"""The images of a source, decoded into one array: once for each content and size, whatever is drawn of them."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glora_llm.data.cache import cached, key_of
from glora_llm.data.columns import Row
from glora_llm.data.image_classes import cell
from glora_llm.data.image_decode import decode
from glora_llm.data.sources import Role, Sources
from glora_llm.errors import UserError
from glora_llm.schema import DataSection

PIXELS, DIGESTS = "pixels.npy", "digests.txt"
AT_ONCE = 4096  # images that threads decode before the next ones are given out


@dataclass(frozen=True)
class Found:
    """The images of one role: where they come from, and what tells other content apart."""

    role: Role
    source: Sources
    content: str


def cached_pixels(
    cache: Path, found: Found, settings: DataSection, side: int | None, numbers: list[int] | None
) -> Path:
    """Return a folder with the pixels (N, S, S, 3) uint8 of a source and a digest of each image, decoded if it is new.

    Args:
        side: of the images; None: that of the first one.
        numbers: of the images that are wanted, in ascending order; None: all.

    Raises:
        UserError: as `write_pixels`.
    """
    size = settings.images.size if settings.images else None
    column = (settings.columns or {}).get("image")
    what = {"pixels of": found.content, "size": size, "side": side, "column": column, "numbers": numbers}

    def build(folder: Path) -> None:
        rows = found.source.read().rows
        chosen = list(range(len(rows))) if numbers is None else numbers
        digests = write_pixels(folder / PIXELS, rows, chosen, settings, side, found.role)
        (folder / DIGESTS).write_text("\n".join(digests), encoding="ascii")

    return cached(cache, key_of(what), build)


def side_of(folder: Path) -> int:
    """Return the side of the square images of a folder that `cached_pixels` returned."""
    return int(np.load(folder / PIXELS, mmap_mode="r").shape[1])


def digests_of(folder: Path) -> list[str]:
    """Return the digests of the images of a folder that `cached_pixels` returned."""
    return (folder / DIGESTS).read_text(encoding="ascii").split("\n")


def encoded_digest(content: Any, origin: str) -> str:
    """Return a digest of an image as it is stored, which is the same on every machine; its pixels may not be.

    Args:
        content: a cell of the column of images.
        origin: of the image, for messages.

    Raises:
        UserError: when its file cannot be read.
    """
    if isinstance(content, dict):
        content = content.get("bytes") or content.get("path")
    if isinstance(content, np.ndarray):
        content = content.tobytes()
    elif isinstance(content, str):
        try:
            content = Path(content).read_bytes()
        except OSError as error:
            raise UserError(f"{origin} is not a readable image: {error}. Repair it, or leave it out.") from error
    return hashlib.blake2b(content if isinstance(content, bytes) else b"", digest_size=16).hexdigest()


def write_pixels(
    file: Path, rows: list[Row], chosen: list[int], settings: DataSection, size: int | None, role: Role
) -> list[str]:
    """Decode images of a source into one array (N, size, size, 3) uint8; return a digest of each.

    Args:
        chosen: numbers of the N rows that are wanted.
        size: of the images; None: that of the first one.

    Raises:
        UserError: for an image that cannot be read, or has another size than the first.
    """
    resize = settings.images.size if settings.images else None
    first = decode(cell(rows[chosen[0]], "image", settings), resize, f"{role} row {chosen[0] + 1}")
    side = size or first.shape[0]
    array = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=(len(chosen), side, side, 3))

    def put(place: int) -> str:
        number = chosen[place]
        pixels = decode(cell(rows[number], "image", settings), resize, f"{role} row {number + 1}")
        if pixels.shape != (side, side, 3):
            raise UserError(
                f"{role} row {number + 1} is an image of {pixels.shape[1]} x {pixels.shape[0]} pixels; expected "
                f"{side} x {side} for all. Set data.images.size={side} to resize them."
            )
        array[place] = pixels
        return hashlib.blake2b(pixels.tobytes(), digest_size=16).hexdigest()

    digests: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow lets go of the interpreter while it decodes
        for start in range(0, len(chosen), AT_ONCE):
            digests += pool.map(put, range(start, min(start + AT_ONCE, len(chosen))))
    array.flush()
    return digests
