"""Rows of files on this machine, and of the data sets that the package ships."""

import hashlib
import importlib.resources
import json
from dataclasses import dataclass
from functools import cached_property
from importlib.resources.abc import Traversable

from glora_llm.data.bad_rows import BadRows
from glora_llm.data.readers import read_file
from glora_llm.data.table import Table, join

# Data sets that the package ships -> their splits.
EMBEDDED = {
    "banking77": ["train", "test"],
    "gsm8k": ["train", "test"],
    "gsm8k_chat": ["train", "test"],
    "tinyshakespeare": ["train", "validation", "test"],
}


@dataclass(frozen=True)
class FileSource:
    """Files that are read one after the other.

    Args:
        files: in the order of their rows.
        documents: read plain text in long pieces instead of line by line.
    """

    files: tuple[Traversable, ...]
    documents: bool = False

    def fingerprint(self) -> str:
        """Return the SHA-256 of the names and contents, in hexadecimal."""
        digest = hashlib.sha256()
        for file in self.files:
            content = hashlib.sha256()
            with file.open("rb") as stream:
                while piece := stream.read(1 << 20):
                    content.update(piece)
            digest.update(f"{file.name}\0{content.hexdigest()}\0".encode())
        return digest.hexdigest()

    def read(self, bad: BadRows | None = None) -> Table:
        """Return the rows of all files.

        Raises:
            UserError: as `read_file`; when there is no row; when two files name their class numbers differently.
        """
        return join((str(file), read_file(file, self.documents, bad)) for file in self.files)


@dataclass(frozen=True)
class EmbeddedSource:
    """A split of a data set that the package ships.

    Args:
        name: one of EMBEDDED.
        split: one of its splits.
        documents: read plain text in long pieces instead of line by line.
    """

    name: str
    split: str
    documents: bool = False

    @cached_property
    def _folder(self) -> Traversable:
        return importlib.resources.files("glora_llm.data") / self.name

    @property
    def _file(self) -> Traversable:
        return next(file for file in self._folder.iterdir() if file.name.startswith(f"{self.split}."))

    def fingerprint(self) -> str:
        """Return the SHA-256 of the split's file, in hexadecimal."""
        return FileSource((self._file,)).fingerprint()

    def read(self, bad: BadRows | None = None) -> Table:
        """Return the rows; those of banking77 with its 77 intents as label names."""
        table = read_file(self._file, self.documents, bad)
        if self.name != "banking77":
            return table
        names = json.loads((self._folder / "categories.json").read_text(encoding="utf-8"))
        rows = [{"text": row["text"], "label": row["category"]} for row in table.rows]
        return Table(rows, {"label": names}, table.places)
