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
    UnequalSharing,
    VLoRALinear,
    allocated,
    choose,
    choose_groups,
    group_losses,
    groups_from_dense,
    make_groups,
    require_budget,
)
from glora_llm.vlora.choose import Search
from glora_llm.vlora.group_losses import Candidate, LinearLosses
from glora_llm.vlora.groups import Group, InputScales

WIDTHS = {"one": (6, 4), "two": (5, 9)}  # (O, I)
DRIFTING = {"tall": (28, 16), "wide": (20, 36)}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, (out_features, in_features) in WIDTHS.items():
            self.add_module(name, nn.Linear(in_features, out_features, bias=False, dtype=torch.float64))


def stack(layers: int) -> Any:
    torch.manual_seed(3)
    return nn.Sequential(*(Layer() for _ in range(layers)))


def scales_of(layers: int) -> dict[tuple[int, str], torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    pairs = itertools.product(range(layers), WIDTHS.items())
    return {(n, name): 0.2 + torch.rand(size[1], generator=generator) for n, (name, size) in pairs}


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


def naive_options(model: Any, name: str, scales: InputScales) -> list[Option]:
    """Every group at every rank, one singular value decomposition a layer."""
    layers = len(model)
    weights = [getattr(layer, name).weight.detach() for layer in model]
    (outputs, inputs), found = weights[0].shape, []
    s = [scales.get((n, name), torch.ones(inputs)).double() for n in range(layers)]
    for count, first in itertools.product(range(1, layers + 1), range(layers)):
        if layers % count or first + count > layers:
            continue
        mean = sum(weights[first : first + count]) / count
        for rank in [0] if count == 1 else range(1, min(outputs, inputs)):
            cost = outputs * inputs + (count > 1) * count * rank * (outputs + inputs)
            loss = 0.0
            for n in range(first, first + count):
                left = torch.linalg.svdvals((weights[n] - mean) * s[n])[rank:]
                loss += float(left.square().sum() / (weights[n] * s[n]).square().sum())
            if cost < count * outputs * inputs or count == 1:
                found.append(Option(Group(name, first, count, rank), cost, loss))
    return found


def partitions(options: list[Option], start: int, layers: int) -> Any:
    if start == layers:
        yield []
        return
    for option in options:
        if option.group.first == start:
            rest = partitions(options, start + option.group.count, layers)
            yield from ([option, *others] for others in rest)


@pytest.mark.parametrize("budget", [0.8, 0.88, 0.95])
@pytest.mark.parametrize("layers", [3, 4])
def test_no_other_choice_within_the_budget_loses_less(layers: int, budget: float) -> None:
    model, scales = stack(layers), scales_of(layers)
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
    assert len(losses) > 1 and sum(option.loss for option in chosen) == pytest.approx(min(losses), abs=1e-12)


def test_candidates_are_all_groups_at_their_ranks_and_lose_what_a_naive_version_says() -> None:
    model, scales = stack(4), scales_of(4)
    for name in WIDTHS:
        found = options_of(LinearLosses(list(model), name, scales).candidates)
        naive = naive_options(model, name, scales)
        assert {option.group: option.cost for option in found} == {option.group: option.cost for option in naive}
        losses = {option.group: option.loss for option in naive}
        assert all(option.loss == pytest.approx(losses[option.group], abs=1e-12) for option in found)


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


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.7])
def test_estimates_in_place_of_most_decompositions_change_no_choice(
    budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = list(drifting(12))
    expected = choose_groups(layers, list(DRIFTING), budget, {})  # all groups of so small a linear are decomposed
    monkeypatch.setattr(group_losses, "SMALL_SIDE", 0)
    monkeypatch.setattr(choose, "ROUND", 3)
    decomposed: list[Candidate] = []
    decompose = LinearLosses.decompose

    def noted(self: LinearLosses, group: Candidate) -> Any:
        decomposed.append(group)
        return decompose(self, group)

    monkeypatch.setattr(LinearLosses, "decompose", noted)
    said: list[str] = []
    found = choose_groups(layers, list(DRIFTING), budget, {}, said.append)
    assert found == expected and sum(group.count > 1 for group in found.groups) >= 2
    shared = [group for name in DRIFTING for group in LinearLosses(layers, name, {}).candidates if group.count > 1]
    assert sum(group.count for group in decomposed) < sum(group.count for group in shared)
    assert "38 groups at 243 ranks, 16 decomposed and 22 estimated" in said[0]


def test_the_loss_without_increments_is_exact_and_estimates_are_rather_too_low(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_losses, "SMALL_SIDE", 0)
    layers, ratios = list(drifting(12)), list[float]()
    for name in DRIFTING:
        known = LinearLosses(layers, name, {})
        products = group_losses._column_products(known._weights)
        estimated = [group for group in known.candidates if not group.exact]
        assert estimated
        for group in estimated:
            low, whole = group.losses, known._without_increments(group, products)
            assert whole == pytest.approx(known.decompose(group)[:, 0].tolist(), rel=1e-9)
            ratios.extend(low / group.losses)
    assert min(ratios) > 0.4 and max(ratios) < 1.1 and np.quantile(ratios, 0.9) < 1


@torch.no_grad()
@pytest.mark.parametrize("weighted", [True, False])
def test_the_loss_is_that_of_the_weights_that_come_out_and_the_count_is_exact(weighted: bool) -> None:
    model, scales = stack(4), scales_of(4) if weighted else {}
    dense = [{name: getattr(layer, name).weight.clone() for name in WIDTHS} for layer in model]
    found = choose_groups(list(model), list(WIDTHS), 0.8, scales)
    promised = {option.group: option for name in WIDTHS for option in naive_options(model, name, scales)}
    fits = groups_from_dense(model, list(model), found, scales)
    lost = 0.0
    for number, layer in enumerate(model):
        for name in WIDTHS:
            wanted, s = dense[number][name], scales.get((number, name), torch.ones(1)).double()
            lost += float(((wanted - getattr(layer, name).weight) * s).norm() ** 2 / (wanted * s).norm() ** 2)
    assert lost == pytest.approx(sum(promised[group].loss for group in found.groups), rel=1e-9)
    assert lost == pytest.approx(sum(fit.weight_error**2 for fit in fits), rel=1e-9) and lost > 0
    cost = sum(promised[group].cost for group in found.groups)
    assert sum(parameter.numel() for parameter in model.parameters()) == cost <= 0.8 * 4 * (24 + 45)
    assert allocated(model).total <= cost and any(isinstance(m, VLoRALinear) for m in model.modules())


@torch.no_grad()
def test_a_folder_of_groups_is_built_again() -> None:
    model, scales = stack(4), scales_of(4)
    found = choose_groups(list(model), list(WIDTHS), 0.7, scales)
    groups_from_dense(model, list(model), found, scales)
    again: Any = make_groups(other := stack(4), list(other), UnequalSharing.from_json(found.as_json()))
    again.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(again[2].one(x), model[2].one(x))


def test_a_budget_that_no_sharing_meets_names_the_nearest() -> None:
    model = stack(4)
    with pytest.raises(UserError, match=r"The nearest has \d+ \(\d+\.\d+ % of the linears\), --budget") as told:
        choose_groups(list(model), list(WIDTHS), 0.3, {})
    with pytest.raises(UserError) as early:
        require_budget(list(model), list(WIDTHS), 0.3)
    assert str(early.value) == str(told.value)
    nearest = float(str(told.value).rpartition("--budget ")[2].rstrip("."))
    require_budget(list(model), list(WIDTHS), nearest)
    assert choose_groups(list(model), list(WIDTHS), nearest, {}).groups
    with pytest.raises(UserError):
        choose_groups(list(model), list(WIDTHS), nearest - 2e-3, {})


def test_one_layer_cannot_share() -> None:
    with pytest.raises(UserError, match=r"Sharing makes none of these linears smaller \(layers: 1\)"):
        choose_groups(list(stack(1)), list(WIDTHS), 0.5, {})


def test_costs_that_share_no_unit_are_rounded_up() -> None:
    draw = np.random.default_rng(0)
    offered = [
        Candidate("x", first, count, np.ones(1, dtype=np.int64), draw.integers(30_001, 90_001, 1), draw.random(1))
        for first, count in ((0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (0, 3), (0, 1), (1, 1))
    ]
    found = Search({"x": offered}, 3, 150_001).best()
    every = [one for one in partitions(options_of(offered), 0, 3) if sum(option.cost for option in one) <= 150_001]
    chosen = [one for one in every if [option.group for option in one] == [group for group, _ in found]]
    assert chosen
    assert sum(loss for _, loss in found) <= min(sum(o.loss for o in one) for one in every) + 1e-12
