"""Rows of a gpu-check: expected, measured, and whether they agree; written after every row, so that nothing is lost."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from glora_llm.errors import CheckFailed

Status = Literal["ok", "failed", "not on this device", "information"]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        item: what was looked at.
        expected: in words.
        measured: in words.
        status: `information` is measured and compared with nothing.
        values: the numbers behind it.
    """

    item: str
    expected: str
    measured: str
    status: Status
    values: dict[str, Any] = field(default_factory=dict)


def compared(item: str, expected: str, measured: str, ok: bool, **values: Any) -> Row:
    """Return a row that passes or fails."""
    return Row(item, expected, measured, "ok" if ok else "failed", values)


def information(item: str, measured: str, **values: Any) -> Row:
    """Return a row of a number that has no bound."""
    return Row(item, "", measured, "information", values)


def absent(item: str, reason: str) -> Row:
    """Return a row of what this device cannot show."""
    return Row(item, "", reason, "not on this device")


class Report:
    """Collects rows, prints them, and writes gpu_check.json and gpu_check.md; a context that notes what ended it.

    Args:
        folder: where to write.
        about: device, versions and command, for the head of both files.
    """

    def __init__(self, folder: Path, about: dict[str, Any]):
        self.folder, self.about = folder, about
        self.rows: list[tuple[str, Row]] = []
        self.check = ""
        self.cause: str | None = None
        self.ended = False
        self.began = time.monotonic()

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.cause = f"{self.check}: {type(error).__name__}: {error}"
        self.ended = True
        self._write()

    def begin(self, check: str) -> None:
        """Say which check begins."""
        self.check = check
        print(f"\n{check}  ({time.monotonic() - self.began:.0f} s)", flush=True)

    def add(self, row: Row) -> None:
        """Take a row.

        Raises:
            CheckFailed: when it failed.
        """
        self.rows.append((self.check, row))
        mark = {"ok": "ok", "failed": "FAILED", "not on this device": "--", "information": ".."}[row.status]
        print(
            f"  {mark:6s} {row.item}: {row.measured}{f' (expected {row.expected})' if row.expected else ''}", flush=True
        )
        self._write()
        if row.status == "failed":
            raise CheckFailed(f"{row.item}: expected {row.expected}, measured {row.measured}")

    def table(self) -> str:
        """Return all rows as a Markdown table."""
        lines = ["| check | item | expected | measured | |", "|---|---|---|---|---|"]
        lines += [
            f"| {check} | {row.item} | {row.expected} | {row.measured} | {row.status} |" for check, row in self.rows
        ]
        return "\n".join(lines) + "\n"

    def _write(self) -> None:
        passed = self.ended and self.cause is None
        content = {
            **self.about,
            "passed": passed,
            "cause": self.cause,
            "seconds": round(time.monotonic() - self.began, 1),
            "rows": [{"check": check, **asdict(row)} for check, row in self.rows],
        }
        (self.folder / "gpu_check.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        head = "\n".join(f"{name}: {value}  " for name, value in self.about.items())
        (self.folder / "gpu_check.md").write_text(f"{head}\n\n{self.table()}", encoding="utf-8")
