"""Choose the layers that share a base, and the ranks of their differences: the least loss under a budget of parameters.

The loss of a linear of layer l, in a group whose base is the mean of its weights and whose increments have rank r, is

    |(W_l - W_base - B_l A_l) diag(s_l)|^2 / |W_l diag(s_l)|^2     (Frobenius)

with s_l the root mean squares of its inputs: the squared error of its outputs, relative to them, where inputs are
uncorrelated. The best B_l A_l leaves the singular values behind the first r, so one decomposition gives all ranks. What
is minimised is the sum over all linears of all layers. It says nothing about how the errors of layers add up.

Letters: L layers, (O, I) a weight, r rank.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from glora_llm.errors import UserError
from glora_llm.vlora.groups import Group, InputScales, UnequalSharing, exact

RANKS = 64  # ranks that are looked at, at most: multiples of the smaller side over this
UNITS = 20_000  # parts of the budget in which costs are counted, rounded up


@dataclass(frozen=True)
class Option:
    """A group that may be chosen.

    Args:
        group: the layers and their rank.
        cost: its parameters.
        loss: the sum of its layers' losses.
    """

    group: Group
    cost: int
    loss: float


@torch.no_grad()
def choose_groups(
    layers: Sequence[nn.Module],
    linears: Sequence[str],
    budget: float,
    scales: InputScales | None,
    tell: Callable[[str], object] | None = None,
) -> UnequalSharing:
    """Return the groups with the least loss whose parameters are at most a share of those of the dense linears.

    Args:
        layers: of a dense model, in order.
        linears: names inside a layer.
        budget: the share, above 0 and below 1.
        scales: s_l; None: nothing is known about the weights (which may have no values), and all differ alike.
        tell: takes a line whenever a linear is done: hundreds of decompositions each, minutes on a CPU.

    Raises:
        UserError: when no groups come within the budget; it names the nearest.
    """
    options: dict[str, list[Option]] = {}
    for name in linears:
        options[name] = list(_options(layers, name, scales))
        if tell is not None:
            tell(f"  {name}: {len(options[name]):,} groups and ranks looked at")
    dense = sum(option.cost for offered in options.values() for option in offered if option.group.count == 1)
    chosen = best_under_budget(options, len(layers), int(budget * dense), dense)
    return UnequalSharing(tuple(option.group for option in chosen))


def best_under_budget(
    options: Mapping[str, Sequence[Option]], layers: int, budget: int, dense: int | None = None
) -> list[Option]:
    """Return the options that cover all layers of every linear with the least loss, for at most `budget` parameters.

    A dynamic programme over (linear, layer, parameters so far): exact, but that parameters are counted in units that
    divide all costs, or, where these would be more than 20,000, in that many parts of the budget, rounded up.

    Args:
        options: linear -> what is offered for its layers.
        dense: parameters without any sharing, for the message.

    Raises:
        UserError: when even the smallest choice is larger.
    """
    _require_reachable(options, layers, budget, dense)
    unit = math.gcd(budget, *(option.cost for offered in options.values() for option in offered))
    unit = max(unit, math.ceil(budget / UNITS))
    room = budget // unit
    best: NDArray[np.float64] = np.zeros(room + 1)  # the least loss so far, by the units that it may take
    taken: list[tuple[list[list[Option]], list[NDArray[np.int32]]]] = []
    for offered in options.values():
        ending: list[list[Option]] = [[] for _ in range(layers + 1)]
        for option in offered:
            ending[option.group.first + option.group.count].append(option)
        losses, choices = [best], [np.zeros(0, dtype=np.int32)]
        for end in range(1, layers + 1):
            loss, choice = _best_ending(ending[end], losses, unit)
            losses.append(loss)
            choices.append(choice)
        best = losses[layers]
        taken.append((ending, choices))
    if not np.isfinite(best[room]):  # the smallest choice fits, but not once its costs are rounded up
        raise UserError(f"A budget of {budget:,} parameters is too near to the least that sharing takes: raise it.")
    found: list[Option] = []
    for ending, choices in reversed(taken):
        end = layers
        while end:
            option = ending[end][choices[end][room]]
            found.append(option)
            room -= math.ceil(option.cost / unit)
            end = option.group.first
    return found[::-1]


def _best_ending(
    offered: Sequence[Option], losses: Sequence[NDArray[np.float64]], unit: int
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Return, by units, the least loss with one of these options as the last, and which of them that is."""
    room = len(losses[0]) - 1
    best, choice = np.full(room + 1, np.inf), np.full(room + 1, -1, dtype=np.int32)
    for index, option in enumerate(offered):
        cost = math.ceil(option.cost / unit)
        if cost > room:
            continue
        loss = losses[option.group.first][: room + 1 - cost] + option.loss
        better = loss < best[cost:]
        best[cost:][better] = loss[better]
        choice[cost:][better] = index
    return best, choice


def _require_reachable(options: Mapping[str, Sequence[Option]], layers: int, budget: int, dense: int | None) -> None:
    least = 0
    for offered in options.values():
        smallest: list[float] = [0] + [math.inf] * layers
        for option in sorted(offered, key=lambda option: option.group.first + option.group.count):
            end = option.group.first + option.group.count
            smallest[end] = min(smallest[end], smallest[option.group.first] + option.cost)
        least += int(smallest[layers])
    if least <= budget:
        return
    shares = ["", ""]
    if dense is not None:
        shares = [f" ({100 * size / dense:.2f} % of the linears)" for size in (budget, least)]
        shares[1] += f", --budget {math.ceil(1e4 * least / dense) / 1e4}"
    raise UserError(
        f"No sharing of these layers has as few as {budget:,} parameters{shares[0]}. The nearest has "
        f"{least:,}{shares[1]}."
    )


def _options(layers: Sequence[nn.Module], name: str, scales: InputScales | None) -> Iterator[Option]:
    """Yield all groups of a linear: of one layer, and of as many as divide the layers, wherever they begin."""
    weights: list[Any] = [layer.get_submodule(name).weight for layer in layers]
    out_features, in_features = (int(size) for size in weights[0].shape)
    full, width = out_features * in_features, out_features + in_features
    step = _rank_step(min(out_features, in_features))
    scaled = [] if scales is None else [_scaled(weights, number, name, scales) for number in range(len(layers))]
    for first in range(len(layers)):
        yield Option(Group(name, first, 1, 0), full, 0.0)
    for count in (n for n in range(2, len(layers) + 1) if len(layers) % n == 0):
        ranks = [r for r in range(step, min(out_features, in_features), step) if r * width * count < (count - 1) * full]
        for first in range(len(layers) - count + 1):
            mine = scaled[first : first + count]
            tails = _unknown_tails(count, weights[0]) if scales is None else _tails(weights, first, mine)
            for rank in ranks:
                yield Option(Group(name, first, count, rank), full + count * rank * width, float(tails[rank]))


def _rank_step(side: int) -> int:
    """Return the step between ranks: a multiple of 8 where ranks are large enough for that to matter little."""
    step = max(1, side // RANKS)
    return step - step % 8 if step >= 8 else step


@dataclass(frozen=True)
class _Scaled:
    """The sizes of a linear's inputs, s (I), and |W diag(s)|^2."""

    s: Tensor
    size: Tensor


def _scaled(weights: Sequence[nn.Parameter], number: int, name: str, scales: InputScales) -> _Scaled:
    weight = exact(weights[number])
    s = scales.get((number, name), torch.ones(weight.shape[1])).to(weight)
    return _Scaled(s, (weight * s).square().sum())


def _tails(weights: Sequence[nn.Parameter], first: int, scaled: Sequence[_Scaled]) -> NDArray[np.float64]:
    """Return the summed loss of a group's layers by rank, from 0 to the smaller side."""
    mine = torch.stack([exact(weight) for weight in weights[first : first + len(scaled)]])
    s = torch.stack([one.s for one in scaled])
    difference = (mine - mine.mean(0)) * s[:, None, :]
    tall = difference.shape[1] > difference.shape[2]
    gram = difference.mT @ difference if tall else difference @ difference.mT
    squares = torch.linalg.eigvalsh(gram).clamp(min=0).flip(-1)  # of the singular values, the largest first
    sizes = torch.stack([one.size for one in scaled]).clamp(min=torch.finfo(gram.dtype).tiny)
    relative = (squares / sizes[:, None]).sum(0).double().cpu().numpy()
    tails: NDArray[np.float64] = np.append(np.cumsum(relative[::-1])[::-1], 0.0)
    return tails


def _unknown_tails(count: int, weight: Tensor) -> NDArray[np.float64]:
    """Return the losses where nothing is known: weights are independent, and their singular values are equal."""
    side = min(weight.shape)
    return (count - 1) * (1 - np.arange(side + 1) / side)
