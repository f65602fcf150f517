"""The strategies: repeatable, within their budget and their limit, and better than chance where the best is known."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from glora_llm.search.driver import Found
from glora_llm.search.space import Space
from glora_llm.search.strategies import STRATEGIES
from tests.search.conftest import ROWS, Toy, is_legal, make_space, run, settings, smallest

SPACE = make_space()
LARGEST = float(np.where(np.isfinite(SPACE.costs), SPACE.costs, 0).max(1).sum())
HALF = LARGEST / 2
NEVER_NONE = make_space(A=["lora", "vector"], B=["vector", "scalar"], E=["scalar"])
NAMES = sorted(STRATEGIES.names())
SEEDS = range(5)
SMALL: dict[str, dict[str, int]] = {
    "additive": {"passes": 12},
    "random": {"passes": 12, "population": 5},
    "evolution": {"population": 6, "parents": 3, "generations": 3},
}


def passes_of(name: str, keys: dict[str, int]) -> int:
    """Forward passes over all rows that a strategy may take."""
    given = settings(**keys)
    return given.population * (given.generations + 1) if name == "evolution" else given.passes


def trace(toy: Toy, found: Found) -> Any:
    return toy.scored, toy.sloped, found.history, [(c.code.tobytes(), *c[1:]) for c in found.candidates]


def test_every_strategy_of_a_recipe_is_there() -> None:
    assert NAMES == sorted(SMALL) == ["additive", "evolution", "random"]
    for name in NAMES:
        assert settings(strategy=name).strategy == name


@pytest.mark.parametrize("limit", [float("inf"), LARGEST / 10])
@pytest.mark.parametrize("name", NAMES)
def test_a_seed_fixes_the_whole_search(name: str, limit: float) -> None:
    traces = []
    for seed in (4, 4, 5):
        toy = Toy(SPACE)
        traces.append(trace(toy, run(toy, limit, strategy=name, seed=seed, **SMALL[name])))
    assert traces[0] == traces[1]
    assert traces[0][0][0] != traces[2][0][0], "another seed begins with another genome"


@pytest.mark.parametrize("share", [None, 0.5, 0.1, 0.0])
@pytest.mark.parametrize("space", [SPACE, NEVER_NONE], ids=["with none", "without"])
@pytest.mark.parametrize("name", NAMES)
def test_every_candidate_is_legal(name: str, space: Space, share: float | None) -> None:
    """Without a limit, and at limits down to the smallest genome, where one is left."""
    least = smallest(space)
    limit = float("inf") if share is None else least + share * (LARGEST - least)
    toy = Toy(space)
    found = run(toy, limit, strategy=name, **SMALL[name])
    codes = {key: np.frombuffer(key, np.uint8) for key, _ in toy.scored}
    assert all(is_legal(space, code, limit) for code in codes.values())
    assert (len(codes) == 1) == (share == 0.0)
    assert 0 < len(found.candidates) <= len(codes)
    for candidate in found.candidates:
        assert candidate.parameters == candidate.cost == space.size(candidate.code)
        assert candidate.score == pytest.approx(toy.truth(candidate.code))
    assert found.best.score == max(c.score for c in found.candidates) == found.history[-1].best
    assert np.isfinite([progress.mean for progress in found.history]).all()


@pytest.mark.parametrize("passes", [20, 40])
@pytest.mark.parametrize("name", NAMES)
def test_a_budget_of_samples_is_kept(name: str, passes: int) -> None:
    keys = (
        {"population": 4, "parents": 2, "generations": passes // 4 - 1} if name == "evolution" else {"passes": passes}
    )
    allowed = passes_of(name, keys) * ROWS
    assert allowed == passes * ROWS
    for seed in SEEDS:
        toy = Toy(SPACE, seed=seed)
        found = run(toy, HALF, strategy=name, seed=seed, **keys)
        assert found.samples == toy.spent() and len(toy.scored) == len(set(toy.scored)), "nothing is scored twice"
        assert found.history[-1].samples == found.samples > allowed / 2
        # The last racer of `additive` is scored on all rows, whatever is left.
        assert found.samples <= allowed + (2 * ROWS if name == "additive" else 0)


@pytest.mark.parametrize("rows", [1, 2, 3, 20])
@pytest.mark.parametrize("name", NAMES)
def test_a_small_space_and_few_rows_are_searched_to_the_end(name: str, rows: int) -> None:
    """Three genes of two choices: strategies run out of genomes that are new, and parts of the rows are single rows."""
    space = make_space(1, A=["none"], B=["none"], C=["none"], D=["none"], E=["scalar", "none"])
    assert sorted(len(gene.specs) for gene in space.genes) == [1] * 11 + [2] * 3
    for seed in SEEDS:
        toy = Toy(space, seed=seed, rows=rows)
        found = run(toy, strategy=name, seed=seed, passes=30, population=8, parents=4, generations=5)
        assert len(toy.scored) == len(set(toy.scored)) <= 8 * rows
        truths = {key: toy.truth(np.frombuffer(key, np.uint8)) for key, _ in toy.scored}
        assert max(truths.values()) <= toy.truth(toy.best()) + 1e-9
        assert found.best.score == pytest.approx(max(truths[c.code.tobytes()] for c in found.candidates))
        if name != "additive":  # which saves rows, and may drop the best by chance where there are two or three
            assert found.best.score == pytest.approx(toy.truth(toy.best()))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_the_least_of_rows_and_passes_is_searched(name: str, rows: int, passes: int) -> None:
    """The first fit has one score, or two."""
    toy = Toy(SPACE, rows=rows)
    found = run(toy, HALF, strategy=name, passes=passes, population=2, parents=1, generations=1)
    assert all(is_legal(SPACE, candidate.code, HALF) for candidate in found.candidates) and found.candidates


def mean_truth(search_once: Callable[[Toy, int], Found]) -> tuple[float, int]:
    """Mean over seeds of the best genome's share of what is between chance (0) and the known best (1), and samples."""
    shares, samples = [], 0
    for seed in SEEDS:
        toy = Toy(SPACE, seed=100 + seed)
        top = toy.truth(toy.best())
        rng = np.random.default_rng(seed)
        chance = np.mean([toy.truth(SPACE.random(rng, float("inf"))) for _ in range(200)])
        found = search_once(toy, seed)
        assert found.best.score == pytest.approx(toy.truth(found.best.code)) and found.best.score <= top + 1e-9
        shares.append((found.best.score - chance) / (top - chance))
        samples += found.samples
    return float(np.mean(shares)), samples


def test_at_equal_samples_both_beat_chance() -> None:
    """60 passes each, at half of the parameters at most."""
    keys: dict[str, dict[str, int]] = {
        "random": {"passes": 60},
        "additive": {"passes": 60},
        "evolution": {"population": 10, "parents": 4, "generations": 5},
    }

    def searched(name: str) -> tuple[float, int]:
        return mean_truth(lambda toy, seed: run(toy, HALF, strategy=name, seed=seed, **keys[name]))

    found = {name: searched(name) for name in NAMES}
    print(found)
    assert all(samples <= 5 * 60 * ROWS for _, samples in found.values())
    assert found["random"][1] == 5 * 60 * ROWS
    share = {name: value for name, (value, _) in found.items()}
    assert share["additive"] > share["random"] + 0.2
    assert share["evolution"] > share["random"] + 0.05


def test_additive_reaches_evolution_with_a_tenth_of_its_samples() -> None:
    """Evolution as in the paper: 50 genomes, then 20 generations of 50."""
    evolution, evolved = mean_truth(lambda toy, seed: run(toy, strategy="evolution", seed=seed))
    additive, fitted = mean_truth(lambda toy, seed: run(toy, strategy="additive", seed=seed, passes=90))
    print(evolution, evolved, additive, fitted)
    assert fitted <= evolved / 10 and evolved <= 5 * 1050 * ROWS
    assert additive >= evolution > 0.5
