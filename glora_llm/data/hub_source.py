"""A split of a data set on the hub, as `datasets` loads it."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from glora_llm.data.bad_rows import BadRows
from glora_llm.data.readers import numbered
from glora_llm.data.table import Table
from glora_llm.errors import UserError

DATA_FOLDER = "GLORA_DATA"
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubSource:
    """A split of a data set on the hub."""

    name: str
    subset: str | None
    split: str
    revision: str | None = None

    @cached_property
    def _dataset(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(self.name, self.subset, split=self.split, revision=self.revision)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"'{self.name}' is no file or folder here, and as a hub data set (subset {self.subset}, split "
                f"'{self.split}') it could not be loaded: {error}. Check the spelling and the network, or give a file; "
                f"a relative path is also looked up below the folder that the variable {DATA_FOLDER} names."
            ) from error

    def commit(self) -> str | None:
        """Return the commit that was loaded, by which `datasets` names the folder of its cache; None: not a commit.

        Raises:
            UserError: when it cannot be loaded, or another commit than the one asked for was in the cache.
        """
        files = [Path(file["filename"]) for file in self._dataset.cache_files]
        found = next((part.name for file in files for part in file.parents if COMMIT.fullmatch(part.name)), None)
        if found and self.revision and COMMIT.fullmatch(self.revision) and found != self.revision:
            raise UserError(
                f"'{self.name}' was asked for at commit {self.revision[:12]}, and the hub's cache here holds "
                f"{found[:12]}: allow the network, or set data.revisions."
            )
        return found

    def fingerprint(self) -> str:
        """Return the fingerprint that `datasets` gives the split.

        Raises:
            UserError: when it cannot be loaded.
        """
        return str(self._dataset._fingerprint)

    def read(self, bad: BadRows | None = None) -> Table:
        """Return the rows of the split.

        Raises:
            UserError: when it cannot be loaded.
        """
        import datasets

        dataset = self._dataset
        names = {c: list(f.names) for c, f in dataset.features.items() if hasattr(f, "names")}
        for column in [c for c, f in dataset.features.items() if isinstance(f, datasets.Image)]:
            dataset = dataset.cast_column(column, datasets.Image(decode=False))  # bytes or a path, as in a parquet file
        rows = dataset.to_list()
        return Table(rows, names, numbered(rows, self.name))
