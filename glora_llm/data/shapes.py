"""Generated images with a rule that a small model learns in seconds: what is drawn, or in which colour.

    embedded:shapes    6 classes: the shape; colour, place and background are drawn at random
    embedded:colours   4 classes: the colour of the shape, on images of the same kind (a second task for a model)

Nothing is stored: the same name and split give the same images, whatever machine draws them.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glora_llm.data.bad_rows import BadRows
from glora_llm.data.table import Table

SIDE = 16  # pixels
ROWS = {"train": 4096, "test": 1024}
SHAPES = ("disc", "frame", "cross", "rows", "columns", "checks")
COLOURS = {"red": (0.9, 0.2, 0.2), "green": (0.2, 0.8, 0.3), "blue": (0.2, 0.4, 0.95), "yellow": (0.9, 0.85, 0.2)}
TASKS = {"shapes": SHAPES, "colours": tuple(COLOURS)}

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class GeneratedSource:
    """A split of a generated set, as columns `image` (an array (H, W, 3) uint8) and `label`.

    Args:
        name: one of TASKS.
        split: one of ROWS.
    """

    name: str
    split: str

    def fingerprint(self) -> str:
        """Return what names the images; a change of this file changes the key of prepared data by itself."""
        return hashlib.sha256(f"{self.name}\0{self.split}".encode()).hexdigest()

    def read(self, bad: BadRows | None = None) -> Table:
        """Draw the images of the split."""
        seed = np.random.SeedSequence([list(TASKS).index(self.name), list(ROWS).index(self.split)])
        random = np.random.Generator(np.random.PCG64(seed))
        rows = []
        for _ in range(ROWS[self.split]):
            shape, colour = int(random.integers(len(SHAPES))), int(random.integers(len(COLOURS)))
            image = draw(SHAPES[shape], tuple(COLOURS.values())[colour], random)
            rows.append({"image": image, "label": shape if self.name == "shapes" else colour})
        return Table(rows, {"label": list(TASKS[self.name])})


def draw(shape: str, colour: tuple[float, ...], random: np.random.Generator) -> NDArray[np.uint8]:
    """Return one image, (16, 16, 3): a shape of 11 to 14 pixels on a dark ground, noise over all of it."""
    size = int(random.integers(11, 15))
    top, left = (int(place) for place in random.integers(0, SIDE - size + 1, 2))
    ground = random.uniform(0.0, 0.3)
    image = np.full((SIDE, SIDE, 3), ground)
    image[top : top + size, left : left + size][mask(shape, size)] = np.array(colour) * random.uniform(0.8, 1.0)
    image += 0.06 * random.standard_normal(image.shape)
    return np.asarray((image.clip(0, 1) * 255).round(), dtype=np.uint8)


def mask(shape: str, size: int) -> Mask:
    """Return which pixels of a square of `size` a shape covers."""
    row, column = np.indices((size, size))
    middle = (size - 1) / 2
    across, down = abs(column - middle), abs(row - middle)
    masks: dict[str, Mask] = {
        "disc": across**2 + down**2 <= (middle + 0.3) ** 2,
        "frame": np.maximum(across, down) > middle - 2,
        "cross": np.minimum(across, down) <= 1,
        "rows": row // 2 % 2 == 0,
        "columns": column // 2 % 2 == 0,
        "checks": (row // 2 + column // 2) % 2 == 0,
    }
    return masks[shape]
