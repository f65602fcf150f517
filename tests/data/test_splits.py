"""Held-out rows: seeded, disjoint, never the same text as a training row."""

from typing import Any

import pytest

from glora_llm.data.sources import Role
from glora_llm.data.splits import Split, make_splits, to_split
from glora_llm.data.table import Table
from glora_llm.errors import UserError
from tests.data.conftest import Settings

POOL = [{"text": f"text {n}"} for n in range(100)]


def texts(split: Split) -> list[str]:
    return [example.text() for example in split.examples]


def table(rows: list[dict[str, Any]]) -> Table:
    return Table(rows, places=[f"a.jsonl, line {n}" for n in range(1, len(rows) + 1)])


def splits_of(settings: Any, seed: int = 0, **rows: list[dict[str, Any]]) -> dict[str, Split]:
    tables = {"train": POOL, **rows}

    def read(role: Role) -> Split:
        return to_split(role, table(tables[role]), settings)

    return {split.role: split for split in make_splits(settings, seed, read)}


def test_shares_and_numbers_are_disjoint_and_complete(settings: Settings) -> None:
    splits = splits_of(settings(validation=0.1, test=15))
    assert {role: len(split.examples) for role, split in splits.items()} == {"train": 75, "validation": 10, "test": 15}
    assert sorted(text for split in splits.values() for text in texts(split)) == sorted(row["text"] for row in POOL)


def test_the_choice_depends_on_the_seed_alone(settings: Settings) -> None:
    chosen = settings(validation=0.1, test=15)
    assert texts(splits_of(chosen)["validation"]) == texts(splits_of(chosen)["validation"])
    assert texts(splits_of(chosen)["test"]) != texts(splits_of(chosen, seed=1)["test"])


def test_validation_changes_no_test_row(settings: Settings) -> None:
    assert texts(splits_of(settings(test=15))["test"]) == texts(splits_of(settings(test=15, validation=30))["test"])


def test_duplicates_of_held_out_rows_leave_training(settings: Settings) -> None:
    pool = POOL + POOL[:50]
    splits = splits_of(settings(validation=30), train=pool)
    held, train = texts(splits["validation"]), texts(splits["train"])
    assert not set(held) & set(train)
    assert splits["train"].duplicates == len(pool) - 30 - len(train) > 0


def test_held_out_rows_of_their_own_source_that_are_in_train_are_counted(settings: Settings) -> None:
    splits = splits_of(settings(test="test"), test=[*POOL[:3], {"text": "new"}])
    assert (splits["test"].also_in_train, len(splits["test"].examples), len(splits["train"].examples)) == (3, 4, 100)


def test_limits_are_seeded_choices_in_order(settings: Settings) -> None:
    chosen = settings(test="test", max_rows=20, max_test_rows=5)
    splits = splits_of(chosen, test=POOL)
    train = texts(splits["train"])
    assert (len(train), len(splits["test"].examples)) == (20, 5)
    assert train == sorted(train, key=lambda t: int(t.split()[1])) != [row["text"] for row in POOL[:20]]
    assert train == texts(splits_of(chosen, test=POOL)["train"]) != texts(splits_of(chosen, seed=1, test=POOL)["train"])


@pytest.mark.parametrize("keys", [{"validation": 0.001}, {"validation": 100}, {"test": 5000}, {"test": 0.999}])
def test_empty_and_too_large_splits(keys: dict[str, Any], settings: Settings) -> None:
    with pytest.raises(UserError, match="at least 1 must be held out and 1 stay"):
        splits_of(settings(**keys))


def test_nothing_but_duplicates(settings: Settings) -> None:
    with pytest.raises(UserError, match="every row left for training reads the same as one of the 1"):
        splits_of(settings(validation=1), train=[{"text": "a"}] * 5)


def test_rows_without_an_answer_are_left_out_and_counted(settings: Settings) -> None:
    split = to_split("train", table([{"text": "a"}, {"text": " \n"}, {"text": None}]), settings())
    assert (texts(split), split.rows_read, split.empty) == (["a"], 3, 2)
    with pytest.raises(UserError, match="answers of all 2 test rows are blank"):
        to_split("test", table([{"text": ""}, {"text": " "}]), settings())


def test_a_wrong_row_is_named_by_its_place(settings: Settings) -> None:
    split = to_split("train", table([{"text": "a"}, {"body": "b"}]), settings())
    assert (texts(split), split.rows_read, split.bad.count) == (["a"], 2, 1)
    with pytest.raises(UserError, match=r"1 of 1 test records cannot be used:\n  a\.jsonl, line 1: There is no column"):
        to_split("test", table([{"body": "b"}]), settings())
