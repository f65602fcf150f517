"""End a launch in which one process failed: name the first failure, and let no process outlive it for long.

A process whose peer is gone may wait in a collective for hours. It waits in C++, so no Python code of its main thread
runs, no signal handler either: a thread has to end it.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from glora_llm.atomic import no_folder_half_written
from glora_llm.errors import CheckFailed, UserError

if TYPE_CHECKING:
    from glora_llm.launch.ranks import Processes

NOTE = "failure.json"
POLL_SECONDS = 2.0
AFTER_FAILURE = 10.0  # seconds for a process to end by itself, with an error of its own
AFTER_SECOND_SIGTERM = 30.0  # seconds: a launcher and its job manager may both send one, and a step has to end


@contextlib.contextmanager
def first_failure(folder: Path, processes: "Processes", advice: Callable[[], str]) -> Iterator[None]:
    """Let only the process that failed first print its traceback, and end this process when another one fails.

    The first to fail creates `failure.json` in the run folder; a process that fails after it (its peer is gone) says
    so in one line, and one that waits in a collective is ended (`Watch`).

    Args:
        advice: returns what the user can do; called when it is needed.
    """
    note, process_rank = folder / NOTE, processes.process_rank
    try:
        with Watch(note, process_rank):
            yield
    except (UserError, CheckFailed) as error:
        if processes.world_size > 1:
            _write_note(note, process_rank, error)
        raise
    except Exception as error:
        if not _write_note(note, process_rank, error):
            raise SystemExit(_ended_by_another(process_rank, note)) from None
        print(f"process {process_rank} failed first: {type(error).__name__}: {error}", flush=True)
        print(advice(), flush=True)
        raise


def forget_failure(folder: Path) -> None:
    """Remove the note of an earlier launch."""
    (folder / NOTE).unlink(missing_ok=True)


def _write_note(note: Path, process_rank: int, error: Exception) -> bool:
    """Write `failure.json`, and return True, unless another process did so before."""
    report = {
        "process_rank": process_rank,
        "error": f"{type(error).__name__}: {error}",
        "traceback": traceback.format_exc(),
    }
    try:
        with note.open("x") as file:
            json.dump(report, file, indent=1)
    except FileExistsError:
        return False
    return True


def _ended_by_another(process_rank: int, note: Path) -> str:
    return f"process {process_rank} stopped, because another process failed first (see {note})"


class Watch:
    """A thread that ends this process soon after another one's failure, or after a second SIGTERM.

    It ends the process from outside the main thread, which may wait in a collective. A checkpoint that is being
    written is completed first.

    Args:
        note: the file that the first process to fail creates.
        process_rank: of this process, for its last words.

    Attributes:
        sigterms: how many came while the program handles them itself.
        deadline: when the process is to end (time.monotonic), None while nothing happened.
    """

    def __init__(self, note: Path, process_rank: int):
        self.note, self.process_rank = note, process_rank
        self.sigterms = 0
        self.deadline: float | None = None
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.thread = threading.Thread(target=self._run, name="watch for failures", daemon=True)

    def __enter__(self) -> "Watch":
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
        self.writer.close()  # the thread reads the end of the stream
        self.thread.join()
        self.reader.close()

    def _run(self) -> None:
        while True:
            if select.select([self.reader], [], [], POLL_SECONDS)[0]:
                signals = self.reader.recv(64)
                if not signals:
                    return
                self.sigterms += signals.count(signal.SIGTERM)
            last_words = self._reason()
            if last_words and self.deadline is not None and time.monotonic() >= self.deadline:
                with no_folder_half_written():
                    print(last_words, file=sys.stderr, flush=True)
                    os._exit(128 + signal.SIGTERM)

    def _reason(self) -> str | None:
        """Return why this process has to end, or None; the first time, set the deadline."""
        if self.note.exists():
            reason, seconds = _ended_by_another(self.process_rank, self.note), AFTER_FAILURE
        elif self.sigterms > 1:
            reason, seconds = f"process {self.process_rank} stopped by a second SIGTERM", AFTER_SECOND_SIGTERM
        else:
            return None
        limit = time.monotonic() + seconds
        self.deadline = limit if self.deadline is None else min(self.deadline, limit)
        return reason
