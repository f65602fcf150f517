"""Prepared data in the cache: the key of what they depend on, and a manifest that shows damage."""

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glora_llm.atomic import make_once

MANIFEST = "manifest.json"


def key_of(parts: dict[str, Any]) -> str:
    """Return a SHA-256 over all that prepared data depend on: these parts, and this package's own code."""
    code = hashlib.sha256()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        code.update(module.read_bytes())
    return hashlib.sha256(json.dumps(parts | {"code": code.hexdigest()}, sort_keys=True).encode()).hexdigest()


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file, read in pieces of 16 MiB."""
    value = 0
    with path.open("rb") as stream:
        while piece := stream.read(1 << 24):
            value = zlib.crc32(piece, value)
    return value


def is_complete(folder: Path) -> bool:
    """Return whether `folder` holds exactly what its manifest says, byte for byte."""
    try:
        manifest: dict[str, dict[str, int]] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all(
            (folder / name).stat().st_size == entry["bytes"] and checksum(folder / name) == entry["crc32"]
            for name, entry in manifest.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _seal(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {str(f.relative_to(folder)): {"bytes": f.stat().st_size, "crc32": checksum(f)} for f in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def cached(cache: Path, key: str, build: Callable[[Path], None]) -> Path:
    """Return the folder cache/key, built by one process if it is absent or damaged.

    Args:
        build: fills the empty folder that it is given.

    Raises:
        UserError: when `cache` cannot be written; and what `build` raises.
    """

    def make(folder: Path) -> None:
        build(folder)
        _seal(folder)

    return make_once(cache / key, make, is_complete)
