"""The Pareto front, the best, and the journal that survives a kill."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from glora_llm.errors import UserError
from glora_llm.search.archive import Journal, Scored, best, pareto_front

IDENTITY = {"supernet": "abc", "rows": "def", "metric": "loss"}
CODES = [np.array(code, np.uint8) for code in ([0, 1, 2], [3, 0, 1], [2, 2, 2])]


def points(count: int, seed: int) -> list[Scored]:
    """Random candidates, many of them alike in score or size."""
    rng = np.random.default_rng(seed)
    return [
        Scored(np.array([n], np.uint8), float(score), int(size), float(size), 0)
        for n, (score, size) in enumerate(rng.integers(0, 12, (count, 2)))
    ]


def beats(one: Scored, other: Scored) -> bool:
    no_worse = one.score >= other.score and one.parameters <= other.parameters
    return no_worse and (one.score > other.score or one.parameters < other.parameters)


@pytest.mark.parametrize("count", [1, 2, 7, 60])
def test_the_front_is_what_nothing_beats(count: int) -> None:
    for seed in range(30):
        found = points(count, seed)
        front = pareto_front(found)
        expected = {(c.score, c.parameters) for c in found if not any(beats(other, c) for other in found)}
        assert {(c.score, c.parameters) for c in front} == expected
        assert len(front) == len(expected), "of candidates that are alike one is kept"
        assert front == sorted(front, key=lambda c: c.parameters)
        assert pareto_front(found[::-1]) == front
    assert pareto_front([]) == []


def test_the_best_of_two_alike_is_the_smaller() -> None:
    found = [Scored(CODES[n], score, size, 0.0, 0) for n, (score, size) in enumerate([(1.0, 5), (2.0, 9), (2.0, 7)])]
    for order in itertools.permutations(found):
        assert best(order) is found[2]


def test_the_best_of_two_alike_in_all_does_not_depend_on_the_order() -> None:
    found = [Scored(code, 1.0, 5, 0.0, 0) for code in CODES]
    assert {best(order).code.tobytes() for order in itertools.permutations(found)} == {CODES[0].tobytes()}


def filled(file: Path | None) -> Journal:
    """Ten rows, of which the first genome has all, the second some, in an order of their own, and the third none."""
    journal, rng = Journal(file, IDENTITY, 10), np.random.default_rng(0)
    for code, rows in ((CODES[0], [4, 1, 9]), (CODES[1], [7, 0]), (CODES[0], [0, 2, 3, 5, 6, 7, 8])):
        journal.record(code, np.array(rows), rng.normal(size=len(rows)) / 3)
    return journal


def again(file: Path, identity: dict[str, str] | None = None) -> Journal:
    return Journal(file, identity or IDENTITY, 10, Journal.read(file))


def require_same(one: Journal, other: Journal) -> None:
    assert one.samples == other.samples and one.values.keys() == other.values.keys()
    for key, values in one.values.items():
        assert np.array_equal(other.values[key], values, equal_nan=True)


def test_a_journal_survives_its_process(tmp_path: Path) -> None:
    file = tmp_path / "search" / "journal.jsonl"
    journal = filled(file)
    for _ in range(2):  # reading it changes nothing
        found = again(file)
        require_same(journal, found)
    assert found.samples == 12 and found.score(CODES[0]) == journal.score(CODES[0]) is not None
    require_same(journal, filled(None))
    assert Journal.read(tmp_path / "none") == []


def test_a_journal_says_what_is_missing() -> None:
    journal = filled(None)
    rows = np.array([8, 7, 3, 0])
    assert journal.missing(CODES[0], rows).tolist() == []
    assert journal.missing(CODES[1], rows).tolist() == [8, 3]
    assert journal.missing(CODES[2], rows).tolist() == [8, 7, 3, 0]
    assert journal.score(CODES[1]) is None and journal.score(CODES[2]) is None
    assert journal.score(CODES[0]) == journal.get(CODES[0], np.arange(10)).mean()
    assert np.array_equal(journal.get(CODES[1], np.array([0, 7])), journal.values[CODES[1].tobytes()][[0, 7]])


def test_a_last_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    filled(file)
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept in [*range(0, len(whole), 17), *range(len(whole) - len(lines[-1]) - 2, len(whole), 3), len(whole) - 1]:
        file.write_bytes(whole[:kept])
        journal = again(file)
        ends = np.cumsum([len(line) for line in lines]) - 1  # the line is whole without its line feed
        complete = int((ends <= kept).sum())
        assert journal.samples == sum([3, 2, 7][: max(0, complete - 1)])
        assert [json.loads(line) for line in file.read_text().splitlines()] == [
            IDENTITY, *map(json.loads, lines[1:complete])
        ]  # fmt: skip
        journal.record(CODES[2], np.array([1]), np.array([0.5]))
        assert again(file).samples == journal.samples


@pytest.mark.parametrize("key", list(IDENTITY))
def test_a_journal_of_something_else_is_refused(key: str, tmp_path: Path) -> None:
    file = tmp_path / "search" / "journal.jsonl"
    filled(file)
    before = file.read_bytes()
    with pytest.raises(UserError, match=rf"scored with different {key}\. Delete {tmp_path / 'search'} to search anew"):
        again(file, IDENTITY | {key: "other"})
    assert file.read_bytes() == before and sorted(file.parent.iterdir()) == [file]


def test_a_journal_names_all_that_differs(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    filled(file)
    with pytest.raises(UserError, match="scored with different metric, rows, supernet"):
        again(file, dict.fromkeys(IDENTITY, "other"))
