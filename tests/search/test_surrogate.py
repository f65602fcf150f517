"""The fit of a search: a sum over slots and a parabola in the sum of their slopes, and the best code by it."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from glora_llm.search.maximum import find_maximum
from glora_llm.search.space import Code, Space
from glora_llm.search.surrogate import Observations, Surrogate
from tests.search.conftest import Toy, make_space, run, smallest

SPACE = make_space()
TINY = make_space(1, A=["none"], B=["lora", "none"], C=["none"], D=["none"], E=["vector", "none"])
THERE = np.isfinite(TINY.parameters)
CODES = [np.array(code, np.uint8) for code in itertools.product(*(range(len(gene.specs)) for gene in TINY.genes))]


def surrogate(curve: float, seed: int = 0, slope: float = 1.0) -> Surrogate:
    rng = np.random.default_rng(seed)
    effects = np.where(THERE, rng.normal(0, 0.3, THERE.shape), -np.inf)
    return Surrogate(effects, np.where(THERE, rng.random(THERE.shape), 0.0), slope, curve)


def random_codes(space: Space, count: int, seed: int = 0) -> list[Code]:
    rng = np.random.default_rng(seed)
    return [space.random(rng, float("inf")) for _ in range(count)]


def test_the_prediction_is_the_formula() -> None:
    """And a tangent is one: a sum that touches the parabola at its total, and lies above it elsewhere."""
    made = surrogate(-0.4)
    for code in CODES[::7]:
        genes = range(len(code))
        total = sum(made.importance[g, code[g]] for g in genes)
        own = sum(made.effects[g, code[g]] for g in genes)
        assert made.predict(code) == pytest.approx(own + total - 0.4 * total**2)
        for at in (total, total - 1, total + 1):
            line = sum(made.tangent(at)[g, code[g]] for g in genes) + 0.4 * at**2
            assert line == pytest.approx(made.predict(code) + 0.4 * (at - total) ** 2)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.2])
@pytest.mark.parametrize("curve", [0.0, -0.05, -0.3, -2.0])
def test_the_best_code_is_near_the_best_of_all(curve: float, share: float) -> None:
    """Of all codes of a small space, tried one by one: six genes leave a price on the cost only few steps."""
    assert len(CODES) == 4**3 * 2**3
    limit = smallest(TINY) + share * (float(np.where(THERE, TINY.costs, 0).max(1).sum()) - smallest(TINY))
    for seed in range(5):
        made = surrogate(curve, seed)
        legal = [made.predict(code) for code in CODES if TINY.cost(code) <= limit]
        found = find_maximum(TINY, made, limit)
        assert TINY.cost(found) <= limit
        lost = (max(legal) - made.predict(found)) / (max(legal) - np.mean(legal))
        assert 0 <= lost < (0.4 if share < 1 else 0.15 if curve < 0 else 1e-9)


def fitted(space: Space, slopes: NDArray[np.float64], score: NDArray[np.float64], codes: list[Code]) -> Surrogate:
    observations = Observations(space, slopes)
    for code, value in zip(codes, score, strict=True):
        observations.add(code, 0, float(value))
    return observations.fit()


def test_a_parabola_is_found() -> None:
    """From forty codes of 42 genes: the effects alone have far more columns than that."""
    slopes = np.where(np.isfinite(SPACE.parameters), np.random.default_rng(1).random(SPACE.parameters.shape), 0.0)
    codes, others = random_codes(SPACE, 40), random_codes(SPACE, 200, seed=9)

    def truth(some: list[Code]) -> NDArray[np.float64]:
        totals = np.array([slopes[np.arange(len(code)), code].sum() for code in some])
        return 44 * totals - totals**2  # highest at 22, about the mean of random codes

    found = fitted(SPACE, slopes, truth(codes), codes)
    assert -found.slope / (2 * found.curve) == pytest.approx(22, abs=0.7)
    predicted = [found.predict(code) for code in others]
    assert np.corrcoef(predicted, truth(others))[0, 1] > 0.95
    assert found.total_importance(find_maximum(SPACE, found, float("inf"))) == pytest.approx(22, abs=1)


def test_what_opens_upwards_is_a_line() -> None:
    """More is not told to be ever better than first order says."""
    slopes = np.where(np.isfinite(SPACE.parameters), np.random.default_rng(1).random(SPACE.parameters.shape), 0.0)
    codes = random_codes(SPACE, 40)
    totals = np.array([slopes[np.arange(len(code)), code].sum() for code in codes])
    found = fitted(SPACE, slopes, totals**2, codes)
    assert found.curve == 0 and found.slope > 0


class Overshooting(Toy):
    """Every choice pushes in one direction, and the score is highest at a bit more than what a random genome pushes."""

    def __init__(self, space: Space, seed: int = 0):
        super().__init__(space, seed)
        self.pairs, self.effects, self.noise = [], self.effects / 2, self.noise / 2
        self.push = np.where(np.isfinite(space.parameters), np.random.default_rng(seed).random(self.effects.shape), 0.0)
        self.usual = float(np.mean([self.pushed(code) for code in random_codes(space, 200)]))
        self.goal = 1.2 * self.usual

    def pushed(self, code: Code) -> float:
        return float(self.push[np.arange(len(code)), code].sum())

    def of_rows(self, code: Code) -> NDArray[np.float64]:
        return super().of_rows(code) - (self.pushed(code) - self.goal) ** 2

    def first_order(self) -> NDArray[np.float64]:
        return super().first_order() + 2 * (self.goal - self.usual) * self.push


def test_additive_does_not_overshoot() -> None:
    """Without a limit; the best genome of the slopes alone is far worse than chance."""
    for seed in range(5):
        toy = Overshooting(SPACE, seed)
        greedy = np.where(np.isfinite(toy.effects), toy.first_order(), -np.inf).argmax(1).astype(np.uint8)
        chance = np.mean([toy.truth(code) for code in random_codes(SPACE, 200)])
        found = run(toy, strategy="additive", seed=seed, passes=60)
        assert toy.truth(greedy) < chance < found.best.score
        assert toy.pushed(found.best.code) == pytest.approx(toy.goal, abs=2)


def test_additive_reaches_evolution_where_strong_choices_overshoot() -> None:
    """With a tenth of its samples, where nothing is limited; a fit without a parabola ends six lower."""

    def mean(**keys: object) -> tuple[float, float]:
        found = [run(Overshooting(SPACE, seed), seed=seed, **keys) for seed in range(4)]
        return float(np.mean([f.best.score for f in found])), float(np.mean([f.samples for f in found]))

    evolution, evolved = mean(strategy="evolution")
    additive, used = mean(strategy="additive", passes=90)
    assert used <= evolved / 10
    assert additive >= evolution - 0.5
