"""Write files and folders that are complete or absent, and make a folder of the cache once.

This is the one place that writes under a temporary name and renames. The temporary name begins with a dot and stands
beside the final one; what a killed process left under it is never read, and the next writer of that name removes it.
"""

import contextlib
import glob
import logging
import os
import shutil
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from glora_llm.errors import UserError
from glora_llm.failpoints import reach

log = logging.getLogger(__name__)
WAIT_SECONDS = 10.0  # between two lines that say that a process waits
_writing = threading.RLock()  # held while a folder is being written


def write_text(file: Path, text: str) -> None:
    """Replace a small file: a reader finds the old text or the new one, never a part."""
    temporary = file.with_name(f".writing-{file.name}.{os.getpid()}")
    for left in file.parent.glob(f"{glob.escape(f'.writing-{file.name}.')}*"):
        if not Path(f"/proc/{left.name.rpartition('.')[2]}").exists():  # its process was killed
            left.unlink(missing_ok=True)
    try:
        reach("file.before_write")
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            reach("file.before_sync")
            os.fsync(stream.fileno())
        reach("file.before_rename")
        temporary.replace(file)
        reach("file.after_rename")
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill; it replaces `folder` when the block ends, and is removed when the block fails.

    A reader finds the old folder, for an instant none, then the new one; never a part of either. Everything is on the
    disk before the new name exists.
    """
    temporary, old = (folder.with_name(f".writing-{folder.name}{end}") for end in ("", ".old"))
    with _writing:
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)
        reach("folder.before_make")
        temporary.mkdir(parents=True)
        try:
            reach("folder.after_make")
            yield temporary
            reach("folder.before_sync")
            _settle(temporary)
            reach("folder.after_sync")
            if folder.exists():
                reach("folder.before_set_aside")
                folder.rename(old)
                reach("folder.after_set_aside")
            reach("folder.before_rename")
            temporary.rename(folder)
            reach("folder.after_rename")
            _sync(folder.parent)
            reach("folder.before_clean")
        finally:
            for left in (temporary, old):
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def no_folder_half_written() -> Iterator[None]:
    """Wait for the end of a `whole_folder` that another thread is filling, and let none begin while the block lasts."""
    with _writing:
        yield


def require_new(out: Path) -> None:
    """Check that a command would not overwrite anything.

    Raises:
        UserError: when `out` exists.
    """
    try:
        if out.exists():
            raise UserError(f"{out} exists already; name a new folder, or delete it.")
        above = next(place for place in out.absolute().parents if place.exists())
    except OSError as error:
        raise UserError(f"{str(out)[:120]} cannot be made: {error.strerror}. Choose another name.") from error
    if not above.is_dir():
        raise UserError(f"{out} cannot be made: {above} is a file. Choose another place.")


def cache_root() -> Path:
    """Return the cache folder: `GLORA_CACHE`, else `~/.cache/glora_llm`. It need not exist."""
    return Path(os.environ.get("GLORA_CACHE") or Path.home() / ".cache" / "glora_llm").expanduser()


def make_once(folder: Path, make: Callable[[Path], None], is_complete: Callable[[Path], bool] = Path.is_dir) -> Path:
    """Return `folder`, a folder of the cache, and call `make(empty folder)` first when it is absent or damaged.

    Of several processes that ask at the same time one makes it; the others wait for its file lock, and say so. Where
    locks do not reach from one machine to another (some shared file systems), each machine makes it, and the first
    one counts. Nothing here needs torch.distributed, so no collective can time out meanwhile.

    Args:
        folder: its name must change whenever what `make` writes would.
        make: fills the empty folder that it is given.
        is_complete: tells whether a folder that exists is whole.

    Raises:
        UserError: when the cache cannot be written; and what `make` raises.
    """
    if is_complete(folder):
        return folder
    from filelock import FileLock, Timeout

    lock, waited = FileLock(folder.parent / f".{folder.name}.lock"), 0.0
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        while not lock.is_locked:
            try:
                lock.acquire(timeout=WAIT_SECONDS)
            except Timeout:
                waited += WAIT_SECONDS
                log.warning("waiting for another process that makes %s, %.0f s so far", folder, waited)
    except OSError as error:
        raise UserError(
            f"Cannot write the cache folder {folder.parent}: {error}. "
            "Set the environment variable GLORA_CACHE to a folder with room that you may write."
        ) from error
    try:
        if not is_complete(folder):
            _make(folder, make, is_complete)
    finally:
        lock.release()
    return folder


def _make(folder: Path, make: Callable[[Path], None], is_complete: Callable[[Path], bool]) -> None:
    """Fill a temporary folder and rename it to `folder`. The caller holds this machine's lock.

    Temporary folders name their machine: another machine's may be in use, for its lock may be invisible here.
    """
    mine = f".{folder.name}.{socket.gethostname()}-"
    for left in folder.parent.glob(f"{glob.escape(mine)}*"):
        shutil.rmtree(left, ignore_errors=True)
    temporary, broken = (folder.with_name(f"{mine}{end}") for end in (os.getpid(), "broken"))
    if folder.exists():
        log.warning("%s is incomplete or damaged and is made again", folder)
        with contextlib.suppress(FileNotFoundError):  # another machine was faster
            folder.rename(broken)
    temporary.mkdir()
    try:
        reach("cache.before_make")
        make(temporary)
        _settle(temporary)
        reach("cache.before_rename")
        try:
            temporary.rename(folder)
        except OSError:
            if not is_complete(folder):  # else another machine, whose locks are invisible here, was faster
                raise
    finally:
        for left in (temporary, broken):
            shutil.rmtree(left, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Give files that a library wrote for their owner alone the usual mode, and wait until everything is on the disk.

    A rename may survive a power cut that the data of the renamed files do not.
    """
    usual = folder.stat().st_mode & 0o666  # mkdir applied the umask
    for path in (*folder.rglob("*"), folder):
        if path.is_symlink():
            continue
        facts = path.stat()
        if stat.S_ISREG(facts.st_mode) and stat.S_IMODE(facts.st_mode) == 0o600 and facts.st_nlink == 1:
            path.chmod(usual)
        _sync(path)
        reach("folder.between_syncs")


def _sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
