"""A run that is told to end (SIGTERM: preemption, a time limit) ends its step, and writes a checkpoint first."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM  # what a shell says of a program that SIGTERM ended


class StopRequest:
    """Notes SIGTERM, so that the training loop can end after its step.

    Attributes:
        made: True when the signal came while this object was listening.
    """

    def __init__(self) -> None:
        self.made = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGTERM rather than end by it, while the context lasts; outside the main thread nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        self.made = True
