"""Groups of layers under a budget: against enumeration, exact counts, and what the errors are."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from glora_llm.errors import UserError
from glora_llm.vlora import UnequalSharing, VLoRALinear, allocated, choose_groups, groups_from_dense, make_groups
from glora_llm.vlora.choose import Option, _options, best_under_budget
from glora_llm.vlora.groups import Group

WIDTHS = {"one": (6, 4), "two": (5, 9)}  # (O, I)


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
    options = {name: list(_options(list(model), name, scales)) for name in WIDTHS}
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


@torch.no_grad()
@pytest.mark.parametrize("weighted", [True, False])
def test_the_loss_is_that_of_the_weights_that_come_out_and_the_count_is_exact(weighted: bool) -> None:
    model, scales = stack(4), scales_of(4) if weighted else {}
    dense = [{name: getattr(layer, name).weight.clone() for name in WIDTHS} for layer in model]
    found = choose_groups(list(model), list(WIDTHS), 0.8, scales)
    promised = {option.group: option for name in WIDTHS for option in _options(list(model), name, scales)}
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
    nearest = float(str(told.value).rpartition("--budget ")[2].rstrip("."))
    assert choose_groups(list(model), list(WIDTHS), nearest, {}).groups
    with pytest.raises(UserError):
        choose_groups(list(model), list(WIDTHS), nearest - 2e-3, {})


def test_costs_that_share_no_unit_are_rounded_up() -> None:
    draw = np.random.default_rng(0)
    options = {
        "x": [
            Option(Group("x", first, count, 1), int(draw.integers(30_001, 90_001)), float(draw.random()))
            for first, count in ((0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (0, 3), (0, 1), (1, 1))
        ]
    }
    found = best_under_budget(options, 3, 150_001)
    assert sum(option.cost for option in found) <= 150_001
    every = [one for one in partitions(options["x"], 0, 3) if sum(option.cost for option in one) <= 150_001]
    assert sum(o.loss for o in found) <= min(sum(o.loss for o in one) for one in every) + 1e-12
