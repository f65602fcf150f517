"""A structure within a budget: limits as written, the knapsack against counting, the even structure, predictors."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from glora_llm.errors import UserError
from glora_llm.glora.path import SlotSpec
from glora_llm.glora.sketch import Directions, leading
from glora_llm.schema import AdapterSection
from glora_llm.search.budget import fits, limits_of, read_budget, structure_choices, uniform
from glora_llm.search.knapsack import Limit, choose
from glora_llm.search.predictors import OF_HALVES, PREDICTORS, Gradients, LayerGradients, scores
from glora_llm.search.space import LayerShape, Space, chosen

SMALL = AdapterSection(rank=2, slots={"A": "lora", "B": "lora", "E": "vector"})


def space_of(*shapes: tuple[str, int, int], section: AdapterSection = SMALL) -> Space:
    return Space([LayerShape(*shape, False) for shape in shapes], structure_choices(section), "product")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.1M", [("parameters", 1e5)]),
        (250000, [("parameters", 250000)]),
        ("20ms", [("seconds", 0.02)]),
        ("0.3m, 12MB", [("parameters", 3e5), ("megabytes", 12)]),
        (["1k", "0.5s"], [("parameters", 1e3), ("seconds", 0.5)]),
    ],
)
def test_a_budget_is_read(text: object, expected: list[tuple[str, float]]) -> None:
    found = read_budget(text)
    assert [one.unit for one in found] == [unit for unit, _ in expected]
    assert [one.most for one in found] == pytest.approx([most for _, most in expected])


@pytest.mark.parametrize("text", ["much", "-3", "0", "1 parsec", "1M,2M", ""])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"adapter\.budget"):
        read_budget(text)


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    """Against every code of a small space, under two limits at once."""
    rng = np.random.default_rng(seed)
    space = space_of(("a.q", 8, 12), ("a.v", 16, 4))
    table = np.where(np.isfinite(space.parameters), rng.random(space.parameters.shape), 0)
    table[:, 0] = 0
    other = np.where(np.isfinite(space.parameters), rng.random(space.parameters.shape), np.inf)
    other[:, 0] = 0
    limits = [Limit(space.parameters, 70.0), Limit(other, 1.2)]
    codes = [np.array(code, np.uint8) for code in itertools.product(*(range(len(gene.specs)) for gene in space.genes))]
    allowed = [code for code in codes if fits(code, limits)]
    best = max(float(chosen(table, code).sum()) for code in allowed)
    found = choose(table, limits)
    assert len(codes) == (3 * 3 * 2) ** 2 and 0 < len(allowed) < len(codes)
    assert fits(found.code, limits)
    assert found.score == pytest.approx(best, rel=1e-6)
    assert found.bound >= found.score - 1e-6


def test_slots_that_are_worth_less_than_nothing_are_left_out() -> None:
    space = space_of(("a.q", 8, 12))
    table = np.where(np.isfinite(space.parameters) & (space.parameters > 0), -1.0, 0.0)
    assert not choose(table, [Limit(space.parameters, 70.0)]).code.any()


def test_an_even_structure_is_one_rank_everywhere() -> None:
    space = space_of(("l.0.q", 10, 10), ("l.0.up", 30, 10), ("l.1.q", 10, 10), ("l.1.up", 30, 10))
    whole = limits_of(space, read_budget(120), {"parameters": space.parameters})
    ranks = {name: path["B"].rank for name, path in space.genome(uniform(space, whole)).items()}
    assert ranks == {"l.0.q": 1, "l.0.up": 1, "l.1.q": 1, "l.1.up": 1}
    more = limits_of(space, read_budget(210), {"parameters": space.parameters})
    ranks = {name: path["B"].rank for name, path in space.genome(uniform(space, more)).items()}
    assert ranks == {"l.0.q": 1, "l.0.up": 2, "l.1.q": 1, "l.1.up": 2}, "80 of the 90 left, not 40"
    less = limits_of(space, read_budget(90), {"parameters": space.parameters})
    ranks = {name: path["B"].rank for name, path in space.genome(uniform(space, less)).items() if path.slots}
    assert ranks == {"l.0.up": 1, "l.1.up": 1}
    least = limits_of(space, read_budget(25), {"parameters": space.parameters})
    assert uniform(space, least).sum() == 1


def test_a_budget_below_the_smallest_structure_names_it() -> None:
    space = space_of(("l.0.q", 10, 10), ("l.0.up", 30, 10))
    with pytest.raises(UserError, match=r"slot E as vector of l\.0\.q alone, which costs 10 parameters"):
        limits_of(space, read_budget(9), {"parameters": space.parameters})


@pytest.mark.parametrize("slots", [{"A": "block"}, {"A": "none"}, {"B": {"mode": "lora", "rank": 3}}])
def test_slots_that_are_no_choice(slots: Any) -> None:
    with pytest.raises(UserError, match="slot"):
        structure_choices(AdapterSection(slots=slots))


def gradients(matrix: torch.Tensor, w0: torch.Tensor, tokens: int, noise: float) -> Gradients:
    """Return what a predictor reads, of a known gradient whose tokens are alike but for noise."""
    low = {}
    for slot, one in (("B", matrix), ("A", w0.t() @ matrix)):
        left, values, right = torch.linalg.svd(one, full_matrices=False)
        low[slot] = Directions(left, values, right)
    spread = {slot: directions.values.square() / tokens + noise for slot, directions in low.items()}
    vectors = {"E": matrix.sum(1), "C": w0.t() @ matrix.sum(1), "A": (matrix * w0).sum(1), "B": matrix.sum(1)}
    squares = {slot: value.square() / tokens + noise for slot, value in vectors.items()}
    return Gradients(low, vectors, spread, squares)


@pytest.mark.parametrize("name", ["first_step", "energy", "curvature", "agreement"])
def test_a_predictor_finds_the_layer_and_the_rank_that_matter(name: str) -> None:
    """One layer's gradient has rank 2 and is the same in both halves; the other's is noise that differs in them."""
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(12, 2).double()).Q, torch.linalg.qr(torch.randn(10, 2).double()).Q
    true = 10 * u @ v.t()
    w0 = torch.randn(12, 10).double() / 10
    layers = {}
    for layer, signal in (("l.0.q", 1.0), ("l.1.q", 0.0)):
        halves = tuple(gradients(signal * true + 0.1 * torch.randn(12, 10).double(), w0, 100, 1.0) for _ in range(2))
        whole = gradients(signal * true, w0, 100, 1.0)
        layers[layer] = LayerGradients(halves if name in OF_HALVES else (whole,), {})
    space = space_of(("l.0.q", 12, 10), ("l.1.q", 12, 10), section=AdapterSection(rank=3, slots={"B": "lora"}))
    table = scores(space, layers, PREDICTORS.get(name))
    rows = [row for row, gene in enumerate(space.genes) if gene.slot == "B"]
    first, second = table[rows[0]], table[rows[1]]
    assert first[1] > 5 * max(abs(second[1]), 1e-9)
    assert first[2] > 1.5 * first[1], "its second direction is as good as its first"
    assert first[3] - first[2] < 0.2 * (first[2] - first[1]), "there is no third one"
    best = choose(table, [Limit(space.parameters, 2 * 22.0)])
    assert space.genome(best.code)["l.0.q"]["B"] == SlotSpec("lora", 2, 16.0 / 2)


@pytest.mark.parametrize("name", ["curvature", "agreement"])
def test_noise_in_a_sketch_is_worth_nothing(name: str) -> None:
    """Gradients as training has them: all their singular values count, and a sketch has room for a few."""
    torch.manual_seed(0)
    size, tokens, kept = 160, 400, 9
    w, v = torch.randn(size, kept).double(), torch.randn(size, 4 * kept + 1).double()
    signal = torch.linalg.qr(torch.randn(size, 2).double()).Q @ torch.linalg.qr(torch.randn(size, 2).double()).Q.t()
    worth = {}
    for strength in (0.0, 6.0):
        halves = []
        for _ in range(2):
            x, dy = torch.randn(2, tokens, size).double()
            matrix = dy.t() @ x + strength * 2 * (tokens * size) ** 0.5 * signal
            low = leading(matrix @ w, v.t() @ matrix, v)
            noise = (low.left.square().t() @ dy.square().sum(0)) * (low.right.square() @ x.square().sum(0)) / tokens
            halves.append(Gradients({"B": low}, {}, {"B": noise}, {}))
        layer = LayerGradients(tuple(halves) if name in OF_HALVES else tuple(halves[:1]), {})
        worth[strength] = float(PREDICTORS.get(name)(layer, "B", "lora")[:3].sum())
    assert abs(worth[0.0]) < 0.05 * worth[6.0]
