"""data.source of format images -> rows of an image and a label: parquet, hub data sets, folders, generated sets."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from glora_llm.data.bad_rows import BadRows
from glora_llm.data.image_lists import ENDING, image_list, lists_of
from glora_llm.data.shapes import ROWS, TASKS, GeneratedSource
from glora_llm.data.sources import SAME_SPLIT, Source, find_path, locate
from glora_llm.data.table import Table
from glora_llm.errors import UserError, nearest

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


@dataclass(frozen=True)
class ImageFolder:
    """A folder with a subfolder of images for each class; the names of the subfolders are the classes."""

    folder: Path

    def __str__(self) -> str:
        return f"the folder {self.folder}"

    def classes(self) -> list[str]:
        """Return the names of the classes in order of the alphabet."""
        return [path.name for path in _classes(self.folder)]

    def files(self) -> list[tuple[Path, int]]:
        """Return (image file, class number) of all images, in a fixed order."""
        found = [
            (file, number) for number, path in enumerate(_classes(self.folder)) for file in sorted(path.rglob("*"))
        ]
        return [(file, number) for file, number in found if _is_image(file)]

    def fingerprint(self) -> str:
        """Return the SHA-256 of the names and contents, in hexadecimal."""
        digest = hashlib.sha256()
        for file, _ in self.files():
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{file.relative_to(self.folder)}\0{content}\0".encode())
        return digest.hexdigest()

    def read(self, bad: BadRows | None = None) -> Table:
        """Return columns `image` (the file's path) and `label`; nothing is decoded yet."""
        rows = [{"image": {"bytes": None, "path": str(file)}, "label": number} for file, number in self.files()]
        return Table(rows, {"label": self.classes()})


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGES and file.is_file() and not file.name.startswith(".")


def _classes(folder: Path) -> list[Path]:
    """Return the subfolders that hold an image, at any depth."""
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    return [path for path in inside if any(_is_image(file) for file in path.rglob("*"))]


def locate_images(name: str, subset: str | None, split: str) -> Source:
    """Return the source of images called `name`: `embedded:NAME`, a folder, a parquet file or a hub data set.

    A folder holds folders `train`, `validation`, `test` of subfolders for each class; or those subfolders themselves,
    which are then the images of whatever split; or lists of images (`train800.txt`) named by their split, as VTAB-1K
    has; or else parquet files, named by their split. A single list is a source too.

    Raises:
        UserError: when there is no such set, folder, file or split.
    """
    if name.startswith("embedded:"):
        return _embedded(name.removeprefix("embedded:"), split)
    path = find_path(name)
    if path is not None and path.is_dir():
        named = next((names for names in SAME_SPLIT if split in names), (split,))
        splits = {inside.name.lower(): inside for inside in path.iterdir() if inside.is_dir()}
        there = next((splits[word] for word in named if word in splits), None)
        if there is not None and _classes(there):
            return ImageFolder(there)
        lists = {file.stem: file for file in lists_of(path)}
        listed = next((lists[word] for word in (split, *named) if word in lists), None)
        if listed is not None:
            return image_list(listed)
        if "test" in lists or "train800" in lists:
            raise UserError(
                f"Folder {path} has lists of images, and none for split '{split}': there is {', '.join(lists)}."
                f"{nearest(split, lists)} VTAB-1K: choose by data.split=train800 data.validation=val200, then train on "
                "data.split=train800val200 data.validation=null."
            )
        if _is_of_classes(path):
            return ImageFolder(path)
        if any(_is_image(file) for file in path.iterdir()):
            raise UserError(
                f"Folder {path} holds images and no classes: expected a subfolder for each class, such as "
                f"{path.name}/cat/1.png. Move the images into folders named after their classes."
            )
    if path is not None and path.is_file() and path.suffix == ENDING:
        return image_list(path)
    return locate(name, subset, split)


def _is_of_classes(folder: Path) -> bool:
    """Tell whether the subfolders hold images themselves: folders of splits hold folders of classes."""
    return any(any(_is_image(file) for file in path.iterdir()) for path in _classes(folder))


def _embedded(name: str, split: str) -> GeneratedSource:
    if name not in TASKS:
        raise UserError(
            f"Unknown embedded image data set '{name}'; there is: {', '.join(TASKS)}.{nearest(name, TASKS)}"
        )
    if split not in ROWS:
        raise UserError(f"embedded:{name} has no split '{split}'; there is: {', '.join(ROWS)}.{nearest(split, ROWS)}")
    return GeneratedSource(name, split)
