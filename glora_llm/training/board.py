"""TensorBoard's writer of a run: a full disk interrupts it, and nothing else."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glora_llm.failpoints import reach


class Board:
    """A SummaryWriter that is opened again, at the next flush, when its file could not be written.

    Args:
        folder: of the event files.
        purge_step: TensorBoard drops what an earlier file has from this step on.
        say: prints a line.

    Attributes:
        writer: torch's SummaryWriter; None while nothing can be written.
        lost: texts and numbers that were not written.
    """

    def __init__(self, folder: Path, purge_step: int, say: Callable[[str], None]):
        self.folder, self.purge_step, self.say = folder, purge_step, say
        self.writer: Any = None
        self.lost = 0
        self._open(purge_step)

    def _open(self, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _keep_writers_quiet()
        try:
            self.writer = SummaryWriter(str(self.folder), purge_step=purge_step)
        except OSError as error:
            self._give_up(error)

    def write(self, action: Callable[[Any], object]) -> None:
        """Let `action` write with the SummaryWriter; when the disk does not take it, say so once, and go on."""
        if self.writer is None:
            self.lost += 1
            return
        try:
            reach("tensorboard.before_write")
            action(self.writer)
        except OSError as error:
            self._give_up(error)

    def flush(self) -> None:
        """Put on disk what waits; open the writer again where it had failed."""
        if self.writer is not None:
            self.write(lambda writer: writer.flush())
            return
        lost, self.lost = self.lost, 0
        self._open(None)
        if self.writer is not None:
            self.say(f"{self.folder} is written again; {lost} entries are in metrics.jsonl alone")

    def close(self) -> None:
        """Flush and close."""
        self.write(lambda writer: writer.close())

    def _give_up(self, error: OSError) -> None:
        broken, self.writer = self.writer, None
        self.lost += 1
        if self.lost == 1:
            self.say(
                f"{self.folder} cannot be written ({error}); training goes on, and this is tried again at the next "
                "checkpoint. Free some disk space."
            )
        if broken is not None:
            try:
                broken.close()
            except OSError:  # what is left in its memory cannot be written either
                return


def _keep_writers_quiet() -> None:
    """Keep TensorBoard's writing thread from printing a traceback of what it also hands to the thread that writes."""
    before = threading.excepthook
    if getattr(before, "is_quiet", False):
        return

    def told(arguments: Any) -> None:
        is_writer = type(arguments.thread).__name__ == "_AsyncWriterThread"
        if not (is_writer and isinstance(arguments.exc_value, OSError)):
            before(arguments)

    told.is_quiet = True  # type: ignore[attr-defined]
    threading.excepthook = told
