"""A search that may be killed at any time, asks nothing twice, and needs all ranks to agree."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glora_llm.errors import UserError
from glora_llm.schema import SearchSection
from glora_llm.search.archive import SLOPE_SAMPLES, Journal
from glora_llm.search.driver import Found, Progress, search
from glora_llm.search.space import Space
from glora_llm.search.strategies import STRATEGIES, Ask, Strategy
from tests.search.conftest import Toy, make_space, run, settings

SPACE = make_space(2)
ROWS = 16
IDENTITY = {"supernet": "abc"}
SMALL: dict[str, dict[str, int]] = {
    "additive": {"passes": 2},
    "random": {"passes": 12, "population": 4},
    "evolution": {"population": 6, "parents": 3, "generations": 3},
}
LIMIT = 400.0


def toy(**keys: Any) -> Toy:
    return Toy(SPACE, rows=ROWS, **keys)


def journal_of(file: Path) -> Journal:
    return Journal(file, IDENTITY, ROWS, Journal.read(file))


def outcome(found: Found) -> Any:
    """All that a search came to, but its time."""
    candidates = [(c.code.tobytes(), *c[1:]) for c in found.candidates]
    return found.best.code.tobytes(), candidates, found.samples, found.history


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("name", SMALL)
def test_a_search_killed_at_any_call_ends_the_same(name: str, at_once: int, tmp_path: Path) -> None:
    keys = {"strategy": name, "seed": 3, **SMALL[name]}
    whole = toy(at_once=at_once)
    expected = run(whole, LIMIT, **keys)
    assert len(whole.calls) >= 3 and len(whole.scored) == len(set(whole.scored)) and whole.spent() == expected.samples
    count = len(whole.calls)
    for calls in {*range(0, count, 1 if count < 25 else count // 9), count - 1}:
        file = tmp_path / f"{calls}.jsonl"
        killed, again = toy(fail_at=calls, at_once=at_once), toy(at_once=at_once)
        with pytest.raises(KeyboardInterrupt):
            run(killed, LIMIT, journal_of(file), **keys)
        found = run(again, LIMIT, journal_of(file), **keys)
        assert outcome(found) == outcome(expected)
        assert killed.scored + again.scored == whole.scored, "nothing is scored twice, nothing is left out"
        assert killed.sloped + again.sloped == whole.sloped and bool(whole.sloped) == (name == "additive")


@pytest.mark.parametrize("name", SMALL)
def test_a_search_killed_at_every_third_call_ends_the_same(name: str, tmp_path: Path) -> None:
    keys = {"strategy": name, **SMALL[name]}
    whole = toy()
    expected = run(whole, LIMIT, **keys)
    scored, kills = [], 0
    while True:
        part = toy(fail_at=3)
        try:
            found = run(part, LIMIT, journal_of(tmp_path / "journal.jsonl"), **keys)
        except KeyboardInterrupt:
            kills += 1
            scored += part.scored
            continue
        break
    assert kills == (len(whole.calls) - 1) // 3 > 2
    assert outcome(found) == outcome(expected) and scored + part.scored == whole.scored


@pytest.mark.parametrize("name", SMALL)
def test_a_kill_while_a_score_is_written_ends_the_same(name: str, tmp_path: Path) -> None:
    """In the middle of a group of three, and in the middle of a line."""
    keys = {"strategy": name, **SMALL[name]}
    file = tmp_path / "journal.jsonl"
    expected = run(toy(at_once=3), LIMIT, journal_of(file), **keys)
    written = file.read_bytes()
    for kept in np.linspace(0, len(written), 12).astype(int).tolist():
        file.write_bytes(written[:kept])
        known = {("values" in e, e["code"], row) for e in whole_lines(written[:kept]) for row in e["rows"]}
        again = toy(at_once=3)
        assert outcome(run(again, LIMIT, journal_of(file), **keys)) == outcome(expected)
        done = {(part is again.scored, c.hex(), row) for part in (again.scored, again.sloped) for c, row in part}
        spent = [1 if scored else SLOPE_SAMPLES for scored, _, _ in done | known]
        assert not done & known and sum(spent) == expected.samples


def whole_lines(text: bytes) -> Iterator[dict[str, Any]]:
    for line in text.split(b"\n")[1:]:
        if line.endswith(b"}"):
            yield json.loads(line)


@pytest.mark.parametrize("name", SMALL)
def test_a_finished_search_is_told_again_without_a_score(name: str, tmp_path: Path) -> None:
    keys = {"strategy": name, **SMALL[name]}
    file, again = tmp_path / "journal.jsonl", toy()
    expected = run(toy(), LIMIT, journal_of(file), **keys)
    found = run(again, LIMIT, journal_of(file), **keys)
    assert outcome(found) == outcome(expected) and again.calls == []


def test_several_limits_share_what_is_known(tmp_path: Path) -> None:
    """One journal: what was scored for one limit is not scored for another, and each keeps its own."""
    keys = {"strategy": "evolution", **SMALL["evolution"]}
    limits, shared, journal = (float("inf"), 600.0, 600.5, 100.0), toy(), journal_of(tmp_path / "journal.jsonl")
    found = [run(shared, limit, journal, **keys) for limit in limits]
    alone = [run(toy(), limit, **keys) for limit in limits]
    assert [outcome(one) for one in found] == [outcome(one) for one in alone]
    assert len(shared.scored) == len(set(shared.scored)) == journal.samples
    assert journal.samples < sum(one.samples for one in found), "limits that are alike ask alike"
    for limit, one in zip(limits, found, strict=True):
        assert max(c.parameters for c in one.candidates) <= limit
    assert max(c.parameters for c in found[0].candidates) > 600


@pytest.mark.parametrize(("at_once", "calls"), [(1, [1] * 12), (3, [3, 1] * 3), (4, [4] * 3), (9, [4] * 3)])
def test_candidates_are_scored_side_by_side(at_once: int, calls: list[int]) -> None:
    """As many as the scorer takes, of one question."""
    side, single = toy(at_once=at_once), toy()
    found = run(side, LIMIT, strategy="random", **SMALL["random"])
    assert side.calls == calls
    expected = run(single, LIMIT, strategy="random", **SMALL["random"])
    assert outcome(found) == outcome(expected) and side.scored == single.scored


@pytest.fixture
def repeating() -> Iterator[list[np.ndarray]]:
    """A strategy that asks for the same genome twice in one question, in part and again in full."""
    sent: list[np.ndarray] = []

    @STRATEGIES.register("repeating")
    def repeat(space: Space, _: SearchSection, limit: float, rows: int) -> Strategy:
        rng = np.random.default_rng(0)
        one, other = (space.random(rng, limit) for _ in range(2))
        sent.append((yield Ask([one, other, one.copy()], np.array([5, 2, 9]), 0)))
        sent.append((yield Ask([other, other.copy(), one], np.arange(rows), 1)))

    yield sent
    del STRATEGIES._entries["repeating"]


def test_what_is_asked_twice_is_scored_once(repeating: list[np.ndarray]) -> None:
    scorer = toy(at_once=2)
    told: list[Progress] = []
    plain = settings().model_copy(update={"strategy": "repeating"})
    found = search(SPACE, plain, LIMIT, scorer, Journal(None, {}, ROWS), told.append)
    assert [values.shape for values in repeating] == [(3, 3), (3, ROWS)]
    first, second = repeating
    assert np.array_equal(first[0], first[2]) and np.array_equal(second[0], second[1])
    assert np.array_equal(second[2][[5, 2, 9]], first[0]) and np.array_equal(second[0][[5, 2, 9]], first[1])
    assert scorer.calls == [2, 2] and set(Counter(scorer.scored).values()) == {1}
    assert len(scorer.scored) == found.samples == 2 * ROWS
    assert told == found.history and [(p.generation, p.samples, p.candidates) for p in told] == [
        (0, 6, 0), (1, 2 * ROWS, 2)
    ]  # fmt: skip
    assert told[0].best == -np.inf and told[0].mean == first.mean() and told[1].mean == second.mean()
    assert told[1].best == max(second.mean(1)) == found.best.score


class OneOfTwoRanks(Toy):
    """A rank that compares its questions with those of another rank."""

    def __init__(self, others: list[str], **keys: Any):
        super().__init__(SPACE, rows=ROWS, **keys)
        self.others, self.texts = others, list[str]()

    def agree(self, text: str) -> bool:
        self.texts.append(text)
        return not self.others or self.others[len(self.texts) - 1] == text


@pytest.mark.parametrize("name", SMALL)
def test_ranks_that_ask_differently_stop(name: str) -> None:
    keys = {"strategy": name, **SMALL[name]}
    first = OneOfTwoRanks([])
    expected = run(first, LIMIT, seed=0, **keys)
    slopes = 2 if name == "additive" else 0  # questions that are no scores
    assert len(first.texts) == len(set(first.texts)) == len(expected.history) + slopes
    same = OneOfTwoRanks(first.texts)
    assert outcome(run(same, LIMIT, seed=0, **keys)) == outcome(expected)
    other = OneOfTwoRanks(first.texts)
    with pytest.raises(UserError, match="processes of this search disagree on the next candidates"):
        run(other, LIMIT, seed=1, **keys)
    assert other.calls == [], "before anything is scored"


def test_ranks_whose_scores_differ_stop_before_the_next_score() -> None:
    """A rank whose scores are others breeds other genomes."""
    keys = {"strategy": "evolution", **SMALL["evolution"]}
    first = OneOfTwoRanks([])
    run(first, LIMIT, **keys)
    other = OneOfTwoRanks(first.texts, seed=1)
    with pytest.raises(UserError, match="Nothing is lost: start all of them again"):
        run(other, LIMIT, **keys)
    assert other.calls == [1] * 6
