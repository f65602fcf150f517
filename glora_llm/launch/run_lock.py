"""One launch at a time writes a run folder: a lock that ends with its process, however that ends."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from glora_llm.errors import UserError

log = logging.getLogger(__name__)
NAME = ".lock"
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}  # some shared file systems
PATIENCE = 1.0  # seconds: another process may just be looking whether the folder is free


class RunLock:
    """The lock of a run folder: a locked file in it, which says who holds it and is removed at the end.

    Args:
        folder: of the run.

    Attributes:
        file: open while this process holds the lock.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self.file: TextIO | None = None

    def holder(self) -> str | None:
        """Return who holds the lock, in words; None: nobody, or there are no locks here."""
        try:
            with self.path.open(encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._owner()
        except OSError:  # no such folder or file
            return None
        return None

    def take(self) -> str | None:
        """Take the lock; return who holds it if that is another process.

        Where the folder cannot be written, or its file system has no locks, there is none, and nobody is refused.
        """
        limit = time.monotonic() + PATIENCE
        while (self.file is None) and (found := self._try()) is not None:
            if time.monotonic() > limit:
                return found
            time.sleep(0.05)
        return None

    def _try(self) -> str | None:
        try:
            file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            log.warning("%s cannot be written (%s): a second run in this folder would not be noticed", self.path, error)
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self.path.exists() or not os.path.samestat(self.path.stat(), os.fstat(file.fileno())):
                file.close()  # its owner has just removed it
                return "another process"
            with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
                file.truncate(0)
                file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}))
                file.flush()
        except BlockingIOError:
            file.close()
            return self._owner()
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            log.warning("%s: no locks here (%s): a second run in this folder would not be noticed", self.path, error)
        self.file = file
        return None

    def _owner(self) -> str:
        try:
            owner = json.loads(self.path.read_text(encoding="utf-8"))
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
            return f"process {owner['pid']} on {owner['host']}, since {since}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def release(self) -> None:
        """Remove the file and let go."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            with contextlib.suppress(OSError):  # its text did not fit on the disk
                self.file.close()
            self.file = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def require_free(folder: Path, holder: str | None) -> None:
    """Check that nobody holds the lock of a run folder.

    Raises:
        UserError: naming who does.
    """
    if holder is not None:
        raise UserError(
            f"{folder} is in use: {holder}, trains or searches in it. Wait until that ends, end it (kill writes a "
            "checkpoint first), or choose another output.dir."
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, in the only process of a command, while the context lasts.

    Raises:
        UserError: when another process holds it.
    """
    with RunLock(folder) as lock:
        require_free(folder, lock.take())
        yield
