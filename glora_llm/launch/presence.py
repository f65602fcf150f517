"""The processes of a launch on one machine see which of them was killed: a lock ends with its process, its file not."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from glora_llm.launch.complaint import launch_folder


class Presence:
    """This process's place among those of its launch: a locked file, which it removes when it leaves by itself.

    Args:
        process_rank: of this process.

    Attributes:
        folder: of the files; None when no launcher started this process.
        file: of this process, open and locked while it is present.
    """

    def __init__(self, process_rank: int):
        self.process_rank = process_rank
        self.folder = launch_folder()
        self.file: TextIO | None = None

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Be present while the context lasts."""
        self._enter()
        try:
            yield
        finally:
            self.leave()

    def _enter(self) -> None:
        if self.folder is None:
            return
        name = f"process-{socket.gethostname()}-{self.process_rank}"
        hidden = self.folder / f".{name}"
        with contextlib.suppress(OSError):  # a folder that cannot be written: the others will not name this process
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self.file = hidden.open("w", encoding="utf-8")
            fcntl.lockf(self.file, fcntl.LOCK_EX)  # released when this process ends, however it does
            hidden.rename(self.folder / name)

    def leave(self) -> None:
        """Say that this process is leaving by itself."""
        if self.folder is None or self.file is None:
            return
        (self.folder / f"process-{socket.gethostname()}-{self.process_rank}").unlink(missing_ok=True)
        self.file.close()
        self.file = None

    def killed(self) -> int | None:
        """Return the number of a process of this machine that ended without leaving, or None."""
        if self.folder is None or self.file is None:
            return None
        for path in sorted(self.folder.glob(f"process-{socket.gethostname()}-*")):
            process_rank = int(path.name.rpartition("-")[2])
            if process_rank != self.process_rank and _is_abandoned(path):
                return process_rank
        return None


def _is_abandoned(path: Path) -> bool:
    try:
        with path.open("r+", encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except (FileNotFoundError, BlockingIOError, PermissionError):
        return False
