"""metrics.jsonl: a JSON object a line, each step once; a disk that is full for a while loses none of it."""

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glora_llm.atomic import write_text
from glora_llm.errors import UserError
from glora_llm.failpoints import reach


class MetricFile:
    """The lines of metrics.jsonl; what cannot be written now is kept in memory and written with the next line.

    Args:
        path: of the file.
        say: prints a line.

    Attributes:
        waiting: lines that are not on the disk.
        failed: lines in a row that could not be written.
    """

    def __init__(self, path: Path, say: Callable[[str], None]):
        self.path, self.say = path, say
        self.waiting: list[str] = []
        self.failed = 0

    def entries(self) -> list[dict[str, Any]]:
        """Return what is in the file, without lines that were cut off."""
        return [entry for _, entry in self._lines()]

    def _lines(self) -> list[tuple[str, dict[str, Any]]]:
        found = []
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):
                entry = json.loads(line)
                if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                    found.append((line, entry))
        return found

    def forget_from(self, start: int) -> None:
        """Keep the lines of steps up to `start`, and drop those that were cut off.

        Raises:
            UserError: when the file cannot be written.
        """
        kept = "".join(f"{line}\n" for line, entry in self._lines() if entry["step"] <= start)
        if self.path.exists() and self.path.read_bytes() != kept.encode():
            try:
                write_text(self.path, kept)
            except OSError as error:
                raise UserError(f"{self.path} cannot be written: {error}. Free some disk space, or mend it.") from error

    def append(self, step: int, values: dict[str, float]) -> None:
        """Write the numbers of a step, after those that could not be written before."""
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        self.waiting.append(json.dumps({"step": step, **plain}) + "\n")
        self.write_waiting()

    def write_waiting(self) -> None:
        """Write what is not on the disk; the first line that fails, and the first that succeeds again, is told."""
        if not self.waiting:
            return
        try:
            reach("metrics.before_write")
            self._write("".join(self.waiting))
        except OSError as error:
            self.failed += 1
            if self.failed == 1:
                self.say(
                    f"{self.path} cannot be written ({error}); training goes on, and the lines are kept in memory "
                    "until it can. Free some disk space."
                )
            return
        if self.failed:
            self.say(f"{self.path} is written again, with the {len(self.waiting)} lines since then")
        self.waiting, self.failed = [], 0

    def _write(self, text: str) -> None:
        """Append a text whole, or leave the file as it was."""
        with self.path.open("ab", buffering=0) as file:
            before, data = file.tell(), text.encode()
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(before)
                raise

    def close(self) -> None:
        """Try a last time, and say what is lost."""
        self.write_waiting()
        if self.waiting:
            self.say(f"{len(self.waiting)} lines of {self.path} could not be written and are lost")
