"""A folder that is made once: behind a file lock, in a temporary folder, renamed when it is complete."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from glora_llm.errors import UserError


def cache_root() -> Path:
    """Return the cache folder: `GLORA_CACHE`, else `~/.cache/glora_llm`. It need not exist."""
    return Path(os.environ.get("GLORA_CACHE") or Path.home() / ".cache" / "glora_llm").expanduser()


def made_once(key: str, make: Callable[[Path], None]) -> Path:
    """Return the cache folder `key`, and call `make(folder)` first when it is not there.

    Of several processes that ask at the same time one makes it and the others wait. A process that dies
    half-way leaves a folder whose name begins with a dot, which nobody reads and the next maker removes.

    Args:
        key: name of the folder in the cache; it must change whenever what `make` writes would.
        make: fills the empty folder that it is given.

    Raises:
        UserError: when the cache folder cannot be written.
    """
    folder = cache_root() / key
    if folder.is_dir():
        return folder
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"Cannot write the cache folder {folder.parent}: {error}. "
            "Set the environment variable GLORA_CACHE to a folder with room that you may write."
        ) from error
    try:
        if not folder.is_dir():
            _make(folder, make)
    finally:
        lock.release()
    return folder


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    """Fill a temporary folder, flush it to disk and rename it to `folder`. The caller holds the lock."""
    for left in folder.parent.glob(f".{folder.name}.tmp*"):
        shutil.rmtree(left)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp", dir=folder.parent))
    try:
        make(temporary)
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                _flush(path)
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until the file is on disk: a rename may outlive a power cut that its data does not."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
