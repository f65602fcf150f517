"""Every wrong input gets one message that says what to do, exit code 2, and leaves nothing behind; quickly."""

import time
from pathlib import Path

import pytest

from tests.bad_input.case import Case, outcome
from tests.bad_input.tables import GROUPS
from tests.bad_input.write_table import PAGE, cell

CASES = {f"{group}: {name}": case for group, cases in GROUPS.items() for name, case in cases.items()}
MOST_SECONDS = 30  # a hang, on a machine that is busy


def test_the_tables_are_whole() -> None:
    assert len(CASES) > 250 and all(case.says != "?" for case in CASES.values())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_message_exit_code_2_and_nothing_written(case: Case, tmp_path: Path) -> None:
    began = time.monotonic()
    found = outcome(case, tmp_path)
    assert found.code == case.code, found.said
    assert case.says in found.said
    assert found.said.count("error: ") == (1 if case.code else 0), found.said
    assert not found.written
    assert time.monotonic() - began < MOST_SECONDS


def test_the_page_lists_every_case() -> None:
    text = PAGE.read_text(encoding="utf-8")
    missing = [name for cases in GROUPS.values() for name in cases if f"| {cell(name)} | " not in text]
    assert not missing, "python -m tests.bad_input.write_table"
    assert f"{len(CASES)} cases." in text
