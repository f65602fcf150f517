"""A table of what was promised and what was seen, printed at the end of a test session."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.runs import Server

Note = Callable[[str, str, str], None]
ROW = "reliability"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A fork server, with a cache of this module's own."""
    made = Server(tmp_path_factory.mktemp("logs"), tmp_path_factory.mktemp("cache"))
    yield made
    made.close()


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Note:
    """Return what adds a row to the table: case, expected, seen."""
    return lambda case, expected, seen: record_property(ROW, [case, expected, seen])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table; a case that failed before it saw anything stands there by its name."""
    rows: list[tuple[str, str, str]] = []
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            if "tests/reliability/" not in getattr(report, "nodeid", ""):
                continue
            found = [tuple(value) for name, value in getattr(report, "user_properties", []) if name == ROW]
            rows += found
            if outcome == "failed":
                rows.append((report.nodeid.rpartition("::")[2], "passes", "FAILED"))
            elif outcome == "skipped" and not found:
                rows.append((report.nodeid.rpartition("::")[2], "runs", f"skipped: {report.longrepr[2]}"))
    if rows:
        terminalreporter.section("reliability")
        widths = [max(len(row[column]) for row in [*rows, ("case", "expected", "seen")]) for column in range(3)]
        for row in [("case", "expected", "seen"), *sorted(set(rows))]:
            terminalreporter.write_line(" | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this module's own."""
    return tmp_path_factory.mktemp("runs")
