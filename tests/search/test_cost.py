"""What a slot adds to a step, measured: what is exact of it, and limits on it."""

import functools

import numpy as np
import pytest
import torch

from glora_llm.glora.path import SlotSpec
from glora_llm.glora.supernet import slot_choices
from glora_llm.search.cost import Costs, cost_key, measure
from glora_llm.search.space import Space
from tests.search.conftest import Toy, is_legal, layers, make_space, run

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@functools.cache
def measured(tokens: int, composition: str = "product", dtype: str = "float32") -> Costs:
    return measure(make_space(2, composition), tokens, DTYPES[dtype], CPU, rounds=2)


def megabytes(costs: Costs, slot: str, mode: str, rank: int = 0, name: str = "down_proj") -> float:
    layer = next(layer for layer in layers(1) if name in layer.name)
    return costs[cost_key(layer, slot, SlotSpec(mode, rank))]["megabytes"]


@pytest.mark.parametrize("composition", ["product", "hadamard"])
def test_every_choice_of_every_shape_is_measured(composition: str) -> None:
    space, costs = make_space(2, composition), measured(32, composition)
    keys = {cost_key(space.layers[gene.layer], gene.slot, spec) for gene in space.genes for spec in gene.specs}
    assert set(costs) == keys and len(keys) == 2 * (6 + 6 + 5 + 3 + 3) + (6 + 6 + 5 + 3)
    for key, cost in costs.items():
        assert all(np.isfinite(value) and value >= 0 for value in cost.values())
        assert (cost["megabytes"] == 0) == (" none " in key)
        assert " none " not in key or cost["seconds"] == 0


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("composition", ["product", "hadamard"])
def test_more_parameters_are_more_megabytes(composition: str, dtype: str) -> None:
    costs = measured(32, composition, dtype)
    for slot in "AB":
        sizes = [megabytes(costs, slot, "lora", rank) for rank in (8, 4, 2)]
        assert sizes[0] > sizes[1] > sizes[2] > 0
        assert sizes[0] > megabytes(costs, slot, "vector") > megabytes(costs, slot, "scalar") > 0
    assert megabytes(costs, "C", "lora", 8) > megabytes(costs, "C", "lora", 2) > megabytes(costs, "C", "vector")


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_what_keeps_nothing_costs_its_weights(dtype: str) -> None:
    """Sixteen bytes for each: weight, gradient and both moments of Adam. down_proj is (O, I) = (8, 16).

    C also keeps the row (W0 c)', (O), of the product that it shares with A.
    """
    costs, size = measured(32, dtype=dtype), {"float32": 4, "bfloat16": 2}[dtype]
    assert megabytes(costs, "C", "vector") == pytest.approx((16 * 16 + size * 8) / 1e6, abs=1e-12)
    assert megabytes(costs, "E", "vector") == 16 * 8 / 1e6
    assert megabytes(costs, "E", "scalar") == 16 / 1e6


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_what_is_kept_for_the_backward_pass_grows_with_the_tokens(dtype: str, size: int) -> None:
    """(T, r) of the thin product, and (T, O) of x W0 where a gain needs it."""
    few, many = measured(32, dtype=dtype), measured(64, dtype=dtype)
    for slot, mode, rank, per_token in (
        ("A", "lora", 8, 8), ("B", "lora", 8, 8), ("B", "lora", 2, 2), ("A", "vector", 0, 8), ("A", "scalar", 0, 8),
        ("B", "vector", 0, 0), ("C", "lora", 8, 0), ("C", "vector", 0, 0), ("E", "vector", 0, 0),
    ):  # fmt: skip
        grown = megabytes(many, slot, mode, rank) - megabytes(few, slot, mode, rank)
        assert grown == pytest.approx(32 * per_token * size / 1e6, abs=1e-12), (slot, mode, rank)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_what_is_there_anyway_counts_once(dtype: str, size: int) -> None:
    """B keeps U (T, r) beside its factors, which are parameters; A as hadamard its factors alone; D b0."""
    weights, kept = 16 * (8 + 16), size * 32
    costs, hadamard = measured(32, dtype=dtype), measured(32, "hadamard", dtype)
    assert megabytes(costs, "D", "vector") == 16 * 8 / 1e6
    for rank in (2, 4, 8):
        assert megabytes(costs, "B", "lora", rank) == pytest.approx(rank * (weights + kept) / 1e6, abs=1e-12)
        assert megabytes(hadamard, "A", "lora", rank) == pytest.approx(rank * weights / 1e6, abs=1e-12)


def test_layers_of_one_shape_share_a_cost() -> None:
    names = [layer for layer in layers(2) if "q_proj" in layer.name]
    assert len({cost_key(layer, "A", SlotSpec("lora", 2)) for layer in names}) == 1
    other = [names[0], names[0]._replace(has_bias=False), names[0]._replace(out_features=9)]
    assert len({cost_key(layer, "A", SlotSpec("lora", 2)) for layer in other}) == 3


@pytest.mark.parametrize("name", ["additive", "evolution", "random"])
def test_a_search_keeps_a_limit_in_megabytes(name: str) -> None:
    costs = measured(32)
    choices = slot_choices(None, [8, 4, 2], 16.0)
    space = Space(layers(2), choices, "product", lambda *given: costs[cost_key(*given)]["megabytes"])
    largest = float(np.where(np.isfinite(space.costs), space.costs, 0).max(1).sum())
    toy = Toy(space, rows=16)
    found = run(toy, largest / 4, strategy=name, passes=12, population=6, generations=2)
    assert all(is_legal(space, np.frombuffer(key, np.uint8), largest / 4) for key, _ in toy.scored)
    assert 0 < found.best.cost <= largest / 4 and found.best.parameters == space.size(found.best.code)
    by_name = {layer.name: layer for layer in space.layers}
    active = [(by_name[n], *pair) for n, path in space.genome(found.best.code).items() for pair in path.active()]
    assert found.best.cost == pytest.approx(sum(costs[cost_key(*given)]["megabytes"] for given in active))
