"""A folder that is built once, by one process, and is complete or absent."""

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glora_llm.errors import UserError

MANIFEST = "manifest.json"
WAIT_SECONDS = 10.0

log = logging.getLogger(__name__)


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
    """Return the folder cache/key, built if it is absent or damaged.

    One process builds, in a folder beside it that is renamed at the end; others wait for the lock and say so every
    10 s. Nothing here needs torch.distributed, so no collective can time out meanwhile.

    Args:
        build: fills the folder that it is given, which does not exist yet.

    Raises:
        UserError: when `cache` cannot be written; and what `build` raises.
    """
    final = cache / key
    if is_complete(final):
        return final
    from filelock import FileLock, Timeout

    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f"{key}.lock")
        waited = 0.0
        while not lock.is_locked:
            try:
                lock.acquire(timeout=WAIT_SECONDS)
            except Timeout:
                waited += WAIT_SECONDS
                log.warning("waiting for another process that prepares the data, %.0f s so far: %s", waited, final)
    except OSError as error:
        raise UserError(f"The data cache {cache} cannot be written ({error}): name another folder.") from error
    try:
        if not is_complete(final):
            _build(final, build)
    finally:
        lock.release()
    return final


def _build(final: Path, build: Callable[[Path], None]) -> None:
    for leftover in final.parent.glob(f"{final.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if final.exists():
        log.warning("the prepared data in %s are incomplete or damaged and are made again", final)
        broken = final.with_name(f"{final.name}.tmp-broken-{os.getpid()}")
        os.rename(final, broken)
        shutil.rmtree(broken, ignore_errors=True)
    partial = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    try:
        build(partial)
        _seal(partial)
        try:
            os.rename(partial, final)
        except OSError:
            if not is_complete(final):  # else another machine, whose locks we do not see, was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
