"""Lists of images beside the images, a line `PATH LABEL` each: how VTAB-1K and its few-shot sets are handed on.

A folder holds train800.txt, val200.txt, train800val200.txt and test.txt, each a split of that name; paths are relative
to the folder of the list.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from glora_llm.data.bad_rows import BadRows
from glora_llm.data.table import Table
from glora_llm.errors import UserError

ENDING = ".txt"


@dataclass(frozen=True)
class ImageList:
    """A list of images; all lists of its folder together say how many classes there are."""

    file: Path

    def __str__(self) -> str:
        return f"the list {self.file}"

    @cached_property
    def lines(self) -> list[tuple[str, int]]:
        """(path, class number) of each image.

        Raises:
            UserError: for a line of another form, naming it.
        """
        return _parse(self.file)

    @cached_property
    def classes(self) -> list[str]:
        """The class numbers as text, from 0 to the largest of all lists of the folder."""
        largest = [max(label for _, label in self.lines)]
        for other in lists_of(self.file.parent):
            if other != self.file:
                largest += [max((label for _, label in _parse(other)), default=0)]
        return [str(number) for number in range(max(largest) + 1)]

    def fingerprint(self) -> str:
        """Return the SHA-256 of the list and of the contents of its images, in hexadecimal."""
        digest = hashlib.sha256(f"{len(self.classes)}\0".encode())
        for path, label in self.lines:
            content = hashlib.sha256((self.file.parent / path).read_bytes()).hexdigest()
            digest.update(f"{path}\0{label}\0{content}\0".encode())
        return digest.hexdigest()

    def require_images(self) -> None:
        """Check that every image of the list is there.

        Raises:
            UserError: naming the first that is not.
        """
        folder = self.file.parent
        missing = [(n, path) for n, (path, _) in enumerate(self.lines, 1) if not (folder / path).is_file()]
        if missing:
            number, path = missing[0]
            others = f", and {len(missing) - 1:,} more images of this list are not there either" if missing[1:] else ""
            raise UserError(
                f"{self.file}, line {number}: there is no image {folder / path}{others}. Paths are relative to the "
                "folder of the list: put the images there, or take the line out."
            )

    def read(self, bad: BadRows | None = None) -> Table:
        """Return columns `image` (the file's path) and `label`; nothing is decoded yet."""
        rows = [
            {"image": {"bytes": None, "path": str(self.file.parent / path)}, "label": label}
            for path, label in self.lines
        ]
        return Table(rows, {"label": self.classes})


def lists_of(folder: Path) -> list[Path]:
    """Return the lists of a folder: text files whose first line is `PATH LABEL`."""
    return [file for file in sorted(folder.glob(f"*{ENDING}")) if _is_list(file)]


def image_list(file: Path) -> ImageList:
    """Return a list whose images are there.

    Raises:
        UserError: when it is no list, or one of its images is not there.
    """
    found = ImageList(file)
    found.require_images()
    return found


def _is_list(file: Path) -> bool:
    with file.open("rb") as stream:
        path, _, label = stream.readline(4096).decode("utf-8", "replace").strip().rpartition(" ")
    return bool(path) and label.isdecimal()


def _parse(file: Path) -> list[tuple[str, int]]:
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        path, _, label = line.strip().rpartition(" ")
        if not line.strip():
            continue
        if not path or not label.isdecimal():
            raise UserError(
                f"{file}, line {number}: got '{line[:80]}', expected `PATH LABEL`, such as `images/train/1.jpg 4`."
            )
        found.append((path.strip(), int(label)))
    if not found:
        raise UserError(f"{file} lists no image: expected lines such as `images/train/1.jpg 4`.")
    return found
