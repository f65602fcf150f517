"""The building blocks of a report's page: tables, figures, lists of facts, and numbers in readable form."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup


@dataclass(frozen=True)
class Table:
    """A table; its first column names the rows.

    Args:
        caption: says what it shows.
        head: the titles of the columns; a column of numbers is aligned by them.
        rows: cells as text; the first of each is the row's name.
        note: a sentence below.
        folded: it is long, and shown when it is asked for.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    folded: bool = False
    kind: str = "table"

    def is_number(self, column: int) -> bool:
        """Tell whether a column holds numbers, so that it is aligned to the right."""
        cells = [row[column] for row in self.rows if column < len(row) and row[column] not in ("", "–")]
        return column > 0 and bool(cells) and all(cell[:1].isdigit() or cell[:1] in "−+-" for cell in cells)


@dataclass(frozen=True)
class Picture:
    """A figure with its caption.

    Args:
        svg: of `page_svg.inline_svg`, or one made here.
        caption: what it shows, and how its curves were thinned.
        wide: it takes the whole width of the page, and scrolls sideways on a phone.
        small: several of its kind stand side by side.
        paper: it stays on white in the dark too, for its colours are shades.
        legend: (class in report.css, opacity, words) of each colour, where the figure has no legend of its own.
    """

    svg: Markup
    caption: str
    wide: bool = False
    small: bool = False
    paper: bool = False
    legend: Sequence[tuple[str, str, str]] = ()
    kind: str = "picture"


@dataclass(frozen=True)
class Facts:
    """Names with values, such as a run's hardware."""

    items: Sequence[tuple[str, str]]
    title: str = ""
    kind: str = "facts"


@dataclass(frozen=True)
class Text:
    """A paragraph; a warning is set off from the rest."""

    text: str
    is_warning: bool = False
    kind: str = "text"


@dataclass(frozen=True)
class Code:
    """Text as it stands in a file or is typed in a shell; folded, where it is long."""

    title: str
    text: str
    folded: bool = False
    kind: str = "code"


@dataclass(frozen=True)
class Sample:
    """A prompt with what was expected and answered."""

    title: str
    parts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Samples:
    """Samples, one below the other."""

    samples: Sequence[Sample]
    note: str = ""
    kind: str = "samples"


Block = Table | Picture | Facts | Text | Code | Samples


@dataclass
class Section:
    """A part of the page with a heading.

    Args:
        title: the heading.
        name: of its place in the page, for links.
        blocks: what it shows; a section without any is left out.
    """

    title: str
    name: str
    blocks: list[Block] = field(default_factory=list)


@dataclass
class Part:
    """A run, a comparison or what runs have in common, as the page shows it.

    Args:
        title: the heading.
        name: of its place in the page.
        lead: what was trained, in a sentence.
        tiles: (what, value, more) of the numbers to see first.
        sections: in their order.
    """

    title: str
    name: str
    lead: str = ""
    tiles: list[tuple[str, str, str]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)

    def add(self, title: str, *blocks: Block | None) -> None:
        """Add a section of the blocks that there are."""
        found = [block for block in blocks if block is not None]
        if found:
            self.sections.append(Section(title, f"{self.name}-{len(self.sections) + 1}", found))


def number(value: Any, digits: int = 4) -> str:
    """Return a number of about `digits` digits, thousands apart; what is none as text, nothing as a dash."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (math.isfinite(value) and value == round(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-4 else f"{value:.2e}"


def score(value: Any) -> str:
    """Return a score with four places behind the point."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return number(value)
    return f"{value:.4f}" if abs(value) < 1000 else number(value)


def duration(seconds: Any) -> str:
    """Return seconds as `43 s`, `12 min` or `3.4 h`."""
    if not isinstance(seconds, int | float):
        return "–"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def gigabytes(value: Any) -> str:
    """Return a size in GB, or in MB where it is less than 0.1 GB."""
    if not isinstance(value, int | float):
        return "–"
    return f"{value:.2f} GB" if value >= 0.1 else f"{1000 * value:.2f} MB"


def machine(hardware: Mapping[str, Any]) -> str:
    """Return the hardware of a launch in words; see `launch.machine.hardware`."""
    gpus = hardware.get("gpus") or []
    kinds = [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)]
    memory = hardware.get("memory_bytes")
    cores = f"{hardware.get('cores', '?')} cores of {hardware.get('cpu', 'a CPU')}"
    size = f"{memory / 1e9:.0f} GB of memory" if isinstance(memory, int | float) else ""
    return ", ".join(part for part in (*kinds, cores, size, str(hardware.get("system", ""))) if part)
