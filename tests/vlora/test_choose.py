"""Groups of layers under a budget: against enumeration, exact counts, and what the errors are."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from glora_llm.errors import UserError
from glora_llm.vlora import (
    Calibration,
    UnequalSharing,
    VLoRALinear,
    allocated,
    choose_groups,
    group_losses,
    groups_from_dense,
    make_groups,
    require_budget,
)
from glora_llm.vlora.group_losses import Candidate, LinearLosses
from glora_llm.vlora.groups import Group

WIDTHS = {"one": (6, 4), "two": (5, 9)}  # (O, I)
DRIFTING = {"tall": (28, 16), "wide": (20, 36)}
NOTHING = Calibration({}, {})


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, (out_features, in_features) in WIDTHS.items():
            self.add_module(name, nn.Linear(in_features, out_features, bias=False, dtype=torch.float64))


def stack(layers: int) -> Any:
    torch.manual_seed(3)
    return nn.Sequential(*(Layer() for _ in range(layers)))


def measured(layers: int, gradients: bool = True, widths: dict[str, tuple[int, int]] = WIDTHS) -> Calibration:
    """Inputs that go together, and gradients that differ by 10^2 between layers and by output."""
    generator = torch.Generator().manual_seed(4)
    roots, g = {}, {}
    for n, (name, (out_features, in_features)) in itertools.product(range(layers), widths.items()):
        x = torch.randn(3 * in_features, in_features, generator=generator, dtype=torch.float64)
        x *= 0.2 + torch.rand(in_features, generator=generator)
        x = x + 0.5 * x.roll(1, 1)
        roots[n, name] = torch.linalg.cholesky(x.T @ x / len(x))
        size = 10 ** (2 * torch.rand(1, generator=generator, dtype=torch.float64) - 1)
        g[n, name] = size * (0.3 + torch.rand(out_features, generator=generator))
    return Calibration(roots, g if gradients else {})


def naive_loss(error: torch.Tensor, weight: torch.Tensor, key: tuple[int, str], by: Calibration) -> float:
    """What an error (O, I) of a weight costs, in float64: the sum over outputs of g^2 E[(error x)^2]."""
    root = by.roots.get(key, torch.eye(weight.shape[1])).double()
    moments = root @ root.T
    squares = torch.einsum("oi,ij,oj->o", error, moments, error)
    if by.gradients:
        return float(by.gradients[key].square() @ squares)
    return float(squares.sum() / torch.einsum("oi,ij,oj->", weight, moments, weight))


@dataclass(frozen=True)
class Option:
    """A group at one rank."""

    group: Group
    cost: int
    loss: float


def options_of(candidates: list[Candidate]) -> list[Option]:
    return [
        Option(found.group(place), int(found.costs[place]), float(found.losses[place]))
        for found in candidates
        for place in range(len(found.ranks))
    ]


def naive_options(model: Any, name: str, by: Calibration) -> list[Option]:
    """Every group at every rank, one singular value decomposition a layer."""
    layers = len(model)
    weights = [getattr(layer, name).weight.detach() for layer in model]
    (outputs, inputs), found = weights[0].shape, []
    for count, first in itertools.product(range(1, layers + 1), range(layers)):
        if layers % count or first + count > layers:
            continue
        mean = sum(weights[first : first + count]) / count
        lost = [[0.0] * min(outputs, inputs)]
        for n in range(first, first + count):
            lost.append(naive_losses(weights[n] - mean, weights[n], (n, name), by))
        for rank in [0] if count == 1 else range(1, min(outputs, inputs)):
            cost = outputs * inputs + (count > 1) * count * rank * (outputs + inputs)
            if cost < count * outputs * inputs or count == 1:
                loss = sum(losses[rank] for losses in lost) if count > 1 else 0.0
                found.append(Option(Group(name, first, count, rank), cost, loss))
    return found


def naive_losses(difference: torch.Tensor, weight: torch.Tensor, key: tuple[int, str], by: Calibration) -> list[float]:
    """What is lost of a difference at each rank from 0, by singular values; symmetric roots of moments as weights."""
    root = by.roots.get(key, torch.eye(weight.shape[1])).double()
    values, vectors = torch.linalg.eigh(root @ root.T)
    root = vectors * values.sqrt() @ vectors.T
    if by.gradients:
        weighted = torch.diag(by.gradients[key]) @ difference @ root
    else:
        weighted = difference @ root / (weight @ root).norm()
    squares = torch.linalg.svdvals(weighted).square()
    return [float(squares[rank:].sum()) for rank in range(len(squares))]


def partitions(options: list[Option], start: int, layers: int) -> Any:
    if start == layers:
        yield []
        return
    for option in options:
        if option.group.first == start:
            rest = partitions(options, start + option.group.count, layers)
            yield from ([option, *others] for others in rest)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("budget", [0.8, 0.88, 0.95])
@pytest.mark.parametrize("layers", [3, 4])
def test_no_other_choice_within_the_budget_loses_less(layers: int, budget: float, gradients: bool) -> None:
    model, scales = stack(layers), measured(layers, gradients)
    options = {name: naive_options(model, name, scales) for name in WIDTHS}
    dense = layers * sum(o * i for o, i in WIDTHS.values())
    found = choose_groups(list(model), list(WIDTHS), budget, scales)
    price = {option.group: option for offered in options.values() for option in offered}
    chosen = [price[group] for group in found.groups]
    assert sum(option.cost for option in chosen) <= budget * dense
    every = [list(partitions(options[name], 0, layers)) for name in WIDTHS]
    losses = [
        sum(option.loss for option in (*one, *two))
        for one, two in itertools.product(*every)
        if sum(option.cost for option in (*one, *two)) <= budget * dense
    ]
    assert len(losses) > 1 and sum(option.loss for option in chosen) == pytest.approx(min(losses), rel=1e-9, abs=1e-12)


def test_candidates_are_all_groups_at_their_ranks_and_lose_what_a_naive_version_says() -> None:
    model, scales = stack(4), measured(4)
    for name in WIDTHS:
        found = options_of(LinearLosses(list(model), name, scales).candidates)
        naive = naive_options(model, name, scales)
        assert {option.group: option.cost for option in found} == {option.group: option.cost for option in naive}
        losses = {option.group: option.loss for option in naive}
        assert all(option.loss == pytest.approx(losses[option.group], rel=1e-9, abs=1e-12) for option in found)


def drifting(layers: int) -> Any:
    """A stack whose weights change from layer to layer, some parts of it faster, and whose spectra are not flat."""
    model = stack(layers)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, (outputs, inputs) in DRIFTING.items():
            falling = torch.arange(1, inputs + 1).double() ** -0.7
            state = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
            for number, layer in enumerate(model):
                turn = 0.2 if number < layers // 2 else 0.7
                state = state + turn * torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
                layer.add_module(name, linear := nn.Linear(inputs, outputs, bias=False, dtype=torch.float64))
                linear.weight.copy_(state * falling)
    return model


BY = [NOTHING, measured(12, widths=DRIFTING)]


@pytest.mark.parametrize("by", BY, ids=["relative", "gradients"])
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.7])
def test_estimates_in_place_of_most_decompositions_change_no_choice(
    budget: float, by: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = list(drifting(12))
    expected = choose_groups(layers, list(DRIFTING), budget, by)  # all groups of so small a linear are decomposed
    monkeypatch.setattr(group_losses, "SMALL_SIDE", 0)
    decomposed: list[Candidate] = []
    decompose = LinearLosses.decompose

    def noted(self: LinearLosses, group: Candidate) -> Any:
        decomposed.append(group)
        return decompose(self, group)

    monkeypatch.setattr(LinearLosses, "decompose", noted)
    said: list[str] = []
    found = choose_groups(layers, list(DRIFTING), budget, by, said.append)
    assert found == expected and sum(group.count > 1 for group in found.groups) >= 2
    shared = [group for name in DRIFTING for group in LinearLosses(layers, name, by).candidates if group.count > 1]
    assert sum(group.count for group in decomposed) < sum(group.count for group in shared)
    assert "38 groups at 243 ranks, 16 decomposed and 22 estimated" in said[0]


@pytest.mark.parametrize("by", BY, ids=["relative", "gradients"])
def test_sizes_without_increments_are_exact_and_estimates_are_rather_too_low(
    by: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_losses, "SMALL_SIDE", 0)
    layers, ratios = list(drifting(12)), list[float]()
    for name in DRIFTING:
        known = LinearLosses(layers, name, by)
        weights = torch.stack([getattr(layer, name).weight.detach() for layer in layers])
        products = group_losses._column_products(list(weights))
        estimated = [group for group in known.candidates if not group.exact]
        assert estimated
        for group in estimated:
            low, mine = group.losses, weights[group.first : group.end]
            s = [by.roots[n, name].square().sum(1).sqrt() if by.roots else 1 for n in range(group.first, group.end)]
            sizes = [float(((w - mine.mean(0)) * one).square().sum()) for w, one in zip(mine, s, strict=True)]
            assert known._sizes(group, products) == pytest.approx(sizes, rel=1e-6)
            known.decompose(group)
            ratios.extend(low / group.losses)
    assert min(ratios) > 0.4 and max(ratios) < 2 and np.quantile(ratios, 0.8) < 1


@torch.no_grad()
@pytest.mark.parametrize("by", [measured(4), measured(4, gradients=False), NOTHING])
def test_the_loss_is_that_of_the_weights_that_come_out_and_the_count_is_exact(by: Calibration) -> None:
    model = stack(4)
    dense = [{name: getattr(layer, name).weight.clone() for name in WIDTHS} for layer in model]
    found = choose_groups(list(model), list(WIDTHS), 0.8, by)
    promised = {option.group: option for name in WIDTHS for option in naive_options(model, name, by)}
    fits = groups_from_dense(model, list(model), found, by)
    lost = relative = 0.0
    for number, layer in enumerate(model):
        for name in WIDTHS:
            wanted = dense[number][name]
            error = wanted - getattr(layer, name).weight
            lost += naive_loss(error, wanted, (number, name), by)
            relative += naive_loss(error, wanted, (number, name), Calibration(by.roots, {}))
    assert lost == pytest.approx(sum(promised[group].loss for group in found.groups), rel=1e-9) and lost > 0
    assert relative == pytest.approx(sum(fit.weight_error**2 for fit in fits), rel=1e-9)
    cost = sum(promised[group].cost for group in found.groups)
    assert sum(parameter.numel() for parameter in model.parameters()) == cost <= 0.8 * 4 * (24 + 45)
    assert allocated(model).total <= cost and any(isinstance(m, VLoRALinear) for m in model.modules())


@torch.no_grad()
def test_a_folder_of_groups_is_built_again() -> None:
    model, scales = stack(4), measured(4)
    found = choose_groups(list(model), list(WIDTHS), 0.7, scales)
    groups_from_dense(model, list(model), found, scales)
    again: Any = make_groups(other := stack(4), list(other), UnequalSharing.from_json(found.as_json()))
    again.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(again[2].one(x), model[2].one(x))


def test_a_budget_that_no_sharing_meets_names_the_nearest() -> None:
    model = stack(4)
    with pytest.raises(UserError, match=r"The nearest has \d+ \(\d+\.\d+ % of the linears\), --budget") as told:
        choose_groups(list(model), list(WIDTHS), 0.3, NOTHING)
    with pytest.raises(UserError) as early:
        require_budget(list(model), list(WIDTHS), 0.3)
    assert str(early.value) == str(told.value)
    nearest = float(str(told.value).rpartition("--budget ")[2].rstrip("."))
    require_budget(list(model), list(WIDTHS), nearest)
    assert choose_groups(list(model), list(WIDTHS), nearest, NOTHING).groups
    with pytest.raises(UserError):
        choose_groups(list(model), list(WIDTHS), nearest - 2e-3, NOTHING)


def test_one_layer_cannot_share() -> None:
    with pytest.raises(UserError, match=r"Sharing makes none of these linears smaller \(layers: 1\)"):
        choose_groups(list(stack(1)), list(WIDTHS), 0.5, NOTHING)
