"""The search among groups under a budget, against enumeration of all choices."""

import itertools

import numpy as np
import pytest

from glora_llm.vlora.group_losses import Candidate
from glora_llm.vlora.group_search import Search
from tests.vlora.test_choose import options_of, partitions


def offer(draw: np.random.Generator, name: str, layers: int, exponent: float) -> list[Candidate]:
    """Groups at random ranks and costs, with losses that differ by up to 10^(2 exponent)."""
    spans = [(first, count) for count in range(1, layers + 1) for first in range(layers - count + 1)]
    found = []
    for first, count in [*spans, *spans]:
        size = int(draw.integers(1, 4))
        costs, losses = draw.integers(30_001, 90_001, size), 10 ** draw.uniform(-exponent, exponent, size)
        found.append(Candidate(name, first, count, np.arange(size), costs, losses))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_the_search_finds_the_least_of_all_choices_by_units(seed: int) -> None:
    """Costs share no unit, so they are rounded up; ways that are left out would have changed nothing."""
    draw = np.random.default_rng(seed)
    offered = {name: offer(draw, name, 3, exponent) for name, exponent in (("x", 2.0), ("y", 0.3))}
    every = [list(partitions(options_of(candidates), 0, 3)) for candidates in offered.values()]
    least = sum(min(sum(option.cost for option in one) for one in ways) for ways in every)
    search = Search(offered, 3, int(least * draw.uniform(1.2, 2)))
    assert search.unit > 1
    fitting = [
        sum(option.loss for option in (*one, *two))
        for one, two in itertools.product(*every)
        if sum(-(-option.cost // search.unit) for option in (*one, *two)) <= search.room
    ]
    found = search.best()
    assert len(fitting) > 1 and sum(way.loss for way in found) == pytest.approx(min(fitting), rel=1e-12)
    assert sum(-(-int(way.group.costs[way.place]) // search.unit) for way in found) <= search.room
    for name in offered:
        covered = [n for way in found if way.group.linear == name for n in range(way.group.first, way.group.end)]
        assert covered == [0, 1, 2]
