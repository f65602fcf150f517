"""Write files and folders that are complete or absent, never half written."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from glora_llm.errors import UserError


def whole_or_nothing(folder: Path, write_into: Callable[[Path], None]) -> None:
    """Replace a folder by one that `write_into` fills: who reads it finds the old one or the new one, never a part."""
    temporary = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_into(temporary)
        for path in (path for path in temporary.rglob("*") if path.is_file()):
            sync(path)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_new(out: Path) -> None:
    """Check that a command would not overwrite anything.

    Raises:
        UserError: when `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already; name a new folder, or delete it.")
