"""One cell of an image column -> pixels (H, W, 3) uint8."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glora_llm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]


def decode(cell: Any, size: int | None, origin: str) -> Pixels:
    """Return an image as RGB, resized to (size, size) where it is not of that size already.

    Resizing is bilinear and keeps no aspect ratio: what transformers' ViTImageProcessor does.

    Args:
        cell: {bytes, path} as in a parquet file of the hub, bytes, or an array (H, W, 3) uint8.
        size: in pixels; None leaves the size as it is.
        origin: of the image, for messages.

    Raises:
        UserError: when it cannot be read, naming file or row, and the reason.
    """
    from PIL import Image, ImageOps

    if isinstance(cell, np.ndarray):
        image = Image.fromarray(cell)
    else:
        stream, origin = _open(cell, origin)
        try:
            image = ImageOps.exif_transpose(Image.open(stream)).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = str(error).replace(f" {stream!r}", "")
            raise UserError(f"{origin} is not a readable image: {reason}. Repair it, or leave it out.") from error
    return _pixels(image, size)


def _open(cell: Any, origin: str) -> tuple[Any, str]:
    """Return (file name or stream, what to call it)."""
    if isinstance(cell, bytes):
        return io.BytesIO(cell), origin
    if isinstance(cell, dict) and cell.get("bytes"):
        return io.BytesIO(cell["bytes"]), f"{origin} ({cell['path']})" if cell.get("path") else origin
    if isinstance(cell, dict) and cell.get("path"):
        return cell["path"], f"{origin} ({cell['path']})"
    raise UserError(
        f"{origin} holds {_kind(cell)}, which is no image; expected encoded bytes, or bytes and path as "
        "`datasets.Image` writes them. Name the column of the images with data.columns: {image: COLUMN}."
    )


def _kind(cell: Any) -> str:
    return "nothing" if cell is None else f"a value of type {type(cell).__name__} ({str(cell)[:40]})"


def _pixels(image: "Image", size: int | None) -> Pixels:
    from PIL import Image

    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image.convert("RGB"), dtype=np.uint8)
