"""End a run that is told to end: by a signal (preemption, Ctrl-C, a closed terminal), or because its launcher is gone.

While steps are trained the request is noted, and the training loop writes a checkpoint first; elsewhere it ends the
process by an exception. A second signal ends the process at once, whatever it waits for. A main thread that waits in
C++ runs no signal handler, so a thread listens too.
"""

import contextlib
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from glora_llm.launch.complaint import count_as_said, print_once
from glora_llm.launch.launcher import Launcher

EXIT_CODE = os.EX_TEMPFAIL  # 75, "try again": the same command goes on
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
ONE_REQUEST = 2.0  # seconds: a terminal and the launcher, or a job manager, each pass the same request on
POLL_SECONDS = 1.0
TOLD = "told-to-end"  # the key under which a launch says it once; scripts/slurm_train.sh looks for its file


class ToldToEnd(SystemExit):
    """The end of a process that was told to end, with exit code 75.

    Args:
        message: what is left to say, once a launch; None: all was said.
    """

    def __init__(self, message: str | None = None):
        super().__init__(EXIT_CODE)
        self.message = message


class StopRequest:
    """Notes that this process was told to end.

    Args:
        max_hours: after so many hours from now it is told to end as by a signal; None: never.

    Attributes:
        reason: the first signal's name, or what else told it; None while nothing did.
        is_deferred: the request is noted only, and somebody asks for it.
        is_followed: the process is ending; nothing is raised again.
    """

    def __init__(self, max_hours: float | None = None) -> None:
        self.limit = math.inf if max_hours is None else time.monotonic() + 3600 * max_hours
        self.reason: str | None = None
        self.is_deferred = self.is_followed = False
        self.launcher = Launcher()

    def made(self) -> bool:
        """Tell whether this process was told to end."""
        if self.reason is None and time.monotonic() >= self.limit:  # the listening thread may be a second late
            self.reason = "output.max_hours"
        return self.reason is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while the context lasts; outside the main thread nothing changes.

        A signal that was ignored stays so: `nohup` keeps a run from ending with its terminal.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        taken = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in taken}
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._listen, args=[reader], name="listen for signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            writer.close()  # the thread reads the end of the stream
            thread.join()
            reader.close()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note a request while the context lasts.

        Raises:
            ToldToEnd: at its end, when a request came that nobody followed.
        """
        self.is_deferred = True
        try:
            yield
        finally:
            self.is_deferred = False
        if self.made():
            self._raise()

    def follow(self) -> ToldToEnd:
        """Return the end of this process, about which everything has been said."""
        self.is_followed = True
        count_as_said(TOLD)
        return ToldToEnd()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name
        if not self.is_deferred:
            self._raise()

    def _raise(self) -> None:
        if not self.is_followed:
            self.is_followed = True
            raise ToldToEnd(f"told to end ({self.reason}). This goes on from what is finished:\n  {self.command}")

    @property
    def command(self) -> str:
        """The command that goes on."""
        return self.launcher.command

    def _listen(self, reader: socket.socket) -> None:
        first: float | None = None
        while True:
            if select.select([reader], [], [], POLL_SECONDS)[0]:
                received = reader.recv(64)
                if not received:
                    return
                numbers = [number for number in received if number in SIGNALS]
                now = time.monotonic()
                if first is not None and numbers and now - first > ONE_REQUEST:
                    _end_at_once(numbers[0])
                first = now if first is None and numbers else first
            elif first is None and (told := self._told_otherwise()) is not None:
                self.reason = told
                os.kill(os.getpid(), signal.SIGTERM)  # the main thread follows it

    def _told_otherwise(self) -> str | None:
        """Return what else than a signal tells this process to end, or None."""
        if time.monotonic() >= self.limit:
            return "output.max_hours"
        return "its launcher ended" if self.launcher.is_gone() else None


def _end_at_once(number: int) -> None:
    name = signal.Signals(number).name
    with contextlib.suppress(OSError):
        print_once(f"told to end a second time ({name}): ended at once, without a further checkpoint", "ended-at-once")
    os._exit(128 + number)


@contextlib.contextmanager
def ended_tidily() -> Iterator[None]:
    """Let SIGTERM end this process by an exception while the context lasts, so that no half-written folder is left.

    Commands that train take the signal themselves (`StopRequest`).
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
