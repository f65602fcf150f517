"""metrics.jsonl: a JSON object a line, each step once; a disk that is full for a while loses none of it."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from glora_llm.errors import UserError
from glora_llm.failpoints import reach

BLOCK = 1 << 16  # bytes that are read at once


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

    def forget_from(self, start: int) -> None:
        """Keep the lines of steps up to `start`, and drop those behind them, whole or cut off.

        Read from the end: a run of a million steps begins as soon as one of ten.

        Raises:
            UserError: when the file cannot be written.
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        ends = (offset for offset, entry in self._from_the_end() if entry["step"] <= start)
        kept = next(ends, 0) if start else 0
        if kept < size:
            try:
                os.truncate(self.path, kept)
            except OSError as error:
                raise UserError(f"{self.path} cannot be written: {error}. Make it writable, or delete it.") from error

    def names_at(self, step: int) -> set[str] | None:
        """Return the names that the lines of a step have, or None where the file has no line at all."""
        names: set[str] | None = None
        for _, entry in self._from_the_end():
            names = names or set()
            if entry["step"] < step:
                break
            names |= entry.keys() if entry["step"] == step else set()
        return names

    def values_at(self, step: int, prefix: str) -> dict[str, float]:
        """Return the numbers of a step whose names begin with `prefix`; one that was not finite is None."""
        found: dict[str, float] = {}
        for _, entry in self._from_the_end():
            if entry["step"] < step:
                break
            if entry["step"] == step:
                found |= {name: value for name, value in entry.items() if name.startswith(prefix)}
        return found

    def _from_the_end(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (offset of its end, entry) of every whole line, the last one first."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            start, rest = file.seek(0, os.SEEK_END), b""
            while start:
                size = min(BLOCK, start)
                start -= size
                file.seek(start)
                # What stands before the first newline belongs to the block before it, or is the file's first line.
                pieces = (file.read(size) + rest).split(b"\n")
                rest, end = pieces[0], start + sum(len(piece) + 1 for piece in pieces[:-1])
                for piece in reversed(pieces[:-1] if start == 0 else pieces[1:-1]):
                    entry = _entry(piece)
                    if entry is not None:
                        yield end, entry
                    end -= len(piece) + 1
                rest += b"\n" if len(pieces) > 1 else b""

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


def _entry(line: bytes) -> dict[str, Any] | None:
    """Return what a line says, or None for one that says no step."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None
