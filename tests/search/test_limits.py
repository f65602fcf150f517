"""Limits as a user writes them."""

import math
from typing import Any

import pytest

from glora_llm.errors import UserError
from glora_llm.search.limits import limits
from tests.search.conftest import settings


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("0.5M", {"0.5M": 500_000}),
        ("250k", {"250k": 250_000}),
        ("250 K", {"250 K": 250_000}),
        (".5m", {".5m": 500_000}),
        ("2G", {"2G": 2e9}),
        ("1e6", {"1e6": 1e6}),
        (1_000_000, {"1000000": 1e6}),
        (0.25, {"0.25": 0.25}),
        (1e-5, {"1e-05": 1e-5}),
        (0, {"0": 0}),
        ("1.0M,0.5M", {"1.0M": 1e6, "0.5M": 5e5}),
        (" 1.0M , 250k ", {"1.0M": 1e6, "250k": 2.5e5}),
        (["0.5M", "1M", "200000"], {"0.5M": 5e5, "1M": 1e6, "200000": 2e5}),
    ],
)
def test_a_limit_is_read_as_it_is_written(budget: Any, expected: dict[str, float]) -> None:
    found = limits(settings(budget=budget))
    assert found == pytest.approx(expected)
    assert list(found) == list(expected)  # the first one is the run's genome


def test_without_a_budget_nothing_is_limited() -> None:
    assert limits(settings()) == {"unlimited": math.inf}


@pytest.mark.parametrize(
    ("budget", "named"),
    [
        ("much", "much"), ("0.5T", "0.5T"), ("-1M", "-1M"), (-5, "-5"), ("1.0M,,2M", ""), (["0.5M", "half"], "half"),
        ("M", "M"), ("1 000", "1 000"), ("", ""), ("1.2.3", "1.2.3"), ("inf", "inf"), ("nan", "nan"),
    ],
)  # fmt: skip
def test_nonsense_is_named(budget: Any, named: str) -> None:
    with pytest.raises(UserError, match=rf"search\.budget '{named}' is no limit; expected something like 0\.5M"):
        limits(settings(budget=budget))
