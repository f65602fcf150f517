"""End a launch in which one process failed or was killed: name it, and let no other outlive it for long.

A process whose peer is gone may wait in a collective for hours. It waits in C++, so no Python code of its main thread
runs, no signal handler either: a thread has to end it.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from glora_llm.atomic import no_folder_half_written
from glora_llm.errors import CheckFailed, UserError
from glora_llm.launch.complaint import print_once, was_said
from glora_llm.launch.presence import Presence
from glora_llm.launch.stop import EXIT_CODE, TOLD, ToldToEnd

if TYPE_CHECKING:
    from glora_llm.launch.ranks import Processes

NOTE = "failure.json"
POLL_SECONDS = 2.0
AFTER_FAILURE = 10.0  # seconds for a process to end by itself, with an error of its own
KILLED_SECONDS = 2.0  # a connection may break before the system has taken away the locks of a killed process


@contextlib.contextmanager
def first_failure(folder: Path, processes: "Processes", advice: Callable[[], str]) -> Iterator[None]:
    """Let only the process that failed first print its traceback, and end this process when another one fails.

    The first to fail creates `failure.json` in the run folder; a process that fails after it (its peer is gone) says
    so in one line, and one that waits in a collective is ended (`Watch`). A process that was killed says nothing: one
    that finds it gone names it.

    Args:
        advice: returns what the user can do; called when it is needed.
    """
    note, process_rank, presence = folder / NOTE, processes.process_rank, Presence(processes.process_rank)
    try:
        with presence.present(), Watch(note, presence, advice):
            yield
    except (UserError, CheckFailed) as error:
        if processes.world_size > 1:
            _write_note(note, process_rank, _described(error), traceback.format_exc())
        raise
    except Exception as error:
        if was_said(TOLD):  # another process was, and ended
            raise ToldToEnd() from None
        if not _write_note(note, process_rank, _described(error), traceback.format_exc()):
            raise SystemExit(_ended_by_another(process_rank, note)) from None
        print(f"process {process_rank} failed first: {_described(error)}", flush=True)
        print(advice(), flush=True)
        raise


@contextlib.contextmanager
def followed_while_waiting(process_rank: int) -> Iterator[None]:
    """End this process soon after another one was told to end, while it waits for it to join the process group.

    It waits in C++, and there is no process group yet that would tell it.
    """
    is_over = threading.Event()

    def follow() -> None:
        deadline: float | None = None
        while not is_over.wait(POLL_SECONDS):
            if was_said(TOLD):
                deadline = deadline or time.monotonic() + AFTER_FAILURE
                if time.monotonic() >= deadline:
                    print(_after_another_was_told(process_rank), file=sys.stderr, flush=True)
                    os._exit(EXIT_CODE)

    thread = threading.Thread(target=follow, name="watch for the end of others", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def forget_failure(folder: Path) -> None:
    """Remove the note of an earlier launch."""
    with contextlib.suppress(OSError):  # a read-only disk: what cannot be written there either is told later
        (folder / NOTE).unlink(missing_ok=True)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _write_note(note: Path, process_rank: int, error: str, trace: str = "") -> bool:
    """Write `failure.json`, and return True, unless another process did so before."""
    report = {"process_rank": process_rank, "error": error, "traceback": trace}
    try:
        with note.open("x", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    except FileExistsError:
        return False
    except OSError as failed:  # a full or read-only disk: the error itself is told, and kept nowhere
        print(f"{note} cannot be written ({failed})", file=sys.stderr, flush=True)
    return True


def _report_killed(note: Path, process_rank: int, advice: Callable[[], str]) -> None:
    """Name a process that was killed, as the first failure."""
    error = "killed (SIGKILL, for instance because the machine had no memory left), or crashed outside Python"
    if _write_note(note, process_rank, error):
        print_once(f"process {process_rank} was {error}. {advice()}", f"killed-{process_rank}")


def _ended_by_another(process_rank: int, note: Path) -> str:
    return f"process {process_rank} stopped, because another process failed first (see {note})"


def _after_another_was_told(process_rank: int) -> str:
    return f"process {process_rank} stopped, because another process was told to end"


class Watch:
    """A thread that ends this process soon after another one's end.

    It ends the process from outside the main thread, which may wait in a collective. A checkpoint that is being
    written is completed first.

    Args:
        note: the file that the first process to fail creates.
        presence: of this process.
        advice: returns what the user can do.

    Attributes:
        deadline: when the process is to end (time.monotonic), None while nothing happened.
    """

    def __init__(self, note: Path, presence: Presence, advice: Callable[[], str]):
        self.note, self.presence, self.advice = note, presence, advice
        self.deadline: float | None = None
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self._run, name="watch for failures", daemon=True)

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self.is_over.set()
        self.thread.join()
        if isinstance(error, Exception) and not isinstance(error, UserError | CheckFailed):
            self._look_for_killed()

    def _look_for_killed(self) -> None:
        """Find out whether a killed process is behind an error of this one."""
        limit = time.monotonic() + KILLED_SECONDS
        while not self.note.exists() and time.monotonic() < limit:
            self._name_killed()
            time.sleep(0.1)

    def _name_killed(self) -> None:
        killed = self.presence.killed()
        if killed is not None and not was_said(TOLD):
            _report_killed(self.note, killed, self.advice)

    def _run(self) -> None:
        while not self.is_over.wait(POLL_SECONDS):
            self._name_killed()
            end = self._reason()
            if end and self.deadline is not None and time.monotonic() >= self.deadline:
                last_words, code = end
                with no_folder_half_written():
                    print(last_words, file=sys.stderr, flush=True)
                    self.presence.leave()
                    os._exit(code)

    def _reason(self) -> tuple[str, int] | None:
        """Return why this process has to end, and its exit code, or None; the first time, set the deadline."""
        process_rank = self.presence.process_rank
        if self.note.exists():
            reason = _ended_by_another(process_rank, self.note), 128 + signal.SIGTERM
        elif was_said(TOLD):
            reason = _after_another_was_told(process_rank), EXIT_CODE
        else:
            return None
        if self.deadline is None:
            self.deadline = time.monotonic() + AFTER_FAILURE
        return reason
