"""Records that cannot be used: collected with place and reason, then refused together, or left out and counted."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from glora_llm.errors import UserError
from glora_llm.schema import DataSection

SHOWN = 10  # bad records that one message lists
LONGEST = 400  # characters of what is said of one record


class RowError(UserError):
    """One record cannot be used.

    Args:
        reason: a few words, the same for every record with this fault: by them the records are counted.
        message: what was got, what was expected, what to do.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass
class BadRows:
    """The records of one source that cannot be used.

    Attributes:
        role: what the source is for.
        records: read in all, the bad ones included.
        reasons: reason -> number of records.
        first: reason -> place and message of its first record.
        shown: reason -> place and message of its first ten.
    """

    role: str = ""
    records: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    shown: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The bad records."""
        return sum(self.reasons.values())

    @property
    def share(self) -> float:
        """The share of the records that is bad."""
        return self.count / max(1, self.records)

    def add(self, place: str, error: RowError) -> None:
        """Take in one bad record.

        Args:
            place: file and line, or file and row.
        """
        message = printable(str(error))
        message = message if len(message) <= LONGEST else f"{message[:LONGEST]}..."
        self.reasons[error.reason] = self.reasons.get(error.reason, 0) + 1
        self.first.setdefault(error.reason, f"{place}: {message}")
        shown = self.shown.setdefault(error.reason, [])
        if len(shown) < SHOWN:
            shown.append((place, message))

    @contextlib.contextmanager
    def collecting(self, place: str) -> Iterator[None]:
        """Take in the record at `place` when what is done with it raises RowError."""
        try:
            yield
        except RowError as error:
            self.add(place, error)

    def require_none(self, advice: str = "Mend them.") -> None:
        """Check that no record is bad.

        Raises:
            UserError: listing the first ten.
        """
        if self.count:
            raise UserError(f"{_listed([self])}\n{advice}")


def require_usable(found: Iterable[BadRows], settings: DataSection) -> None:
    """Check the bad records of all sources: none with data.bad_rows=error, few enough with skip.

    Raises:
        UserError: listing the first ten (error), or the reasons and the first record of each (skip).
    """
    bad = [one for one in found if one.count]
    worst = max(bad, key=lambda one: one.share, default=BadRows())
    too_many = worst.share > settings.max_bad_rows
    if bad and settings.bad_rows == "error":
        raise UserError(f"{_listed(bad)}\n{_advice(worst, settings, too_many)}")
    if too_many:
        reasons = "".join(f"\n  {line}" for line in counted(worst.reasons, worst.first))
        raise UserError(
            f"{worst.count:,} of {worst.records:,} {worst.role} records cannot be used, more than "
            f"data.max_bad_rows={settings.max_bad_rows} of them:{reasons}\n"
            f"Mend them, look whether data.format and data.columns fit, or set data.max_bad_rows={_next(worst)}."
        )


def counted(reasons: dict[str, int], first: dict[str, str]) -> list[str]:
    """Return a line for each reason, the most frequent first: how many records, and the first of them."""
    order = sorted(reasons, key=lambda reason: -reasons[reason])
    return [f"{reasons[reason]:,} x {reason}; the first: {first[reason]}" for reason in order]


def printable(text: str) -> str:
    """Return the text in one line, with line breaks and every other control character written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _listed(bad: list[BadRows]) -> str:
    count = sum(one.count for one in bad)
    of = ", ".join(f"{one.count:,} of {one.records:,} {one.role}".rstrip() for one in bad)
    shown = [pair for one in bad for pair in sorted(chain(*one.shown.values()), key=_position)][:SHOWN]
    head = f"{of} records cannot be used" if count == len(shown) else f"{of} records cannot be used; the first {SHOWN}"
    lines, before = [], ""
    for place, message in shown:
        lines.append(f"\n  {place}: {'the same' if message == before else message}")
        before = message
    return f"{head}:{''.join(lines)}"


def _position(shown: tuple[str, str]) -> tuple[str, int]:
    """Return the file and the number of a record: records are found bad by the reader, the format and the template."""
    file, _, number = shown[0].rpartition(" ")
    return file, int(number) if number.isdecimal() else 0


def _advice(worst: BadRows, settings: DataSection, too_many: bool) -> str:
    if not too_many:
        return "Mend them, or leave them out: data.bad_rows=skip"
    return (
        f"Mend them, or look whether data.format and data.columns fit. To leave them out: data.bad_rows=skip "
        f"data.max_bad_rows={_next(worst)} (as a rule it stops above {settings.max_bad_rows} of the records)"
    )


def _next(worst: BadRows) -> float:
    """Return the smallest share in whole percents that lets these records pass."""
    return min(0.99, math.ceil(round(worst.share * 100, 9)) / 100)
