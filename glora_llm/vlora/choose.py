"""Choose the layers that share a base, and the ranks of their differences: the least loss under a budget of parameters.

What is minimised is the sum over all linears of all layers of what `group_losses` computes. It says nothing about how
the errors of layers add up.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from glora_llm.errors import UserError
from glora_llm.vlora.group_losses import Candidate, Floats, Integers, LinearLosses
from glora_llm.vlora.groups import Group, InputScales, UnequalSharing

UNITS = 20_000  # parts of the budget in which costs are counted, rounded up
ROUND = 50  # groups that are decomposed at least before losses are compared anew, which takes as long as these


def choose_groups(
    layers: Sequence[nn.Module],
    linears: Sequence[str],
    budget: float,
    scales: InputScales | None,
    tell: Callable[[str], object] | None = None,
) -> UnequalSharing:
    """Return the groups with the least loss whose parameters are at most a share of those of the dense linears.

    Losses that are estimated at first (see `group_losses`) are decomposed until those of all groups are that a choice
    better than the best one known could have. So the choice is the best of all, unless the estimate of a group
    is more than `DOUBT` too high.

    Args:
        layers: of a dense model, in order.
        linears: names inside a layer.
        budget: the share, above 0 and below 1.
        scales: root mean squares of inputs; None: nothing is known about the weights (which may have no values), and
            all differ alike.
        tell: takes a line whenever a linear is done, and for every round of a closer look: together hundreds of
            decompositions, half a minute on a CPU for 30 layers of width 576.

    Raises:
        UserError: when no groups come within the budget; it names the nearest.
    """
    known: dict[str, LinearLosses] = {}
    for name in linears:
        known[name] = LinearLosses(layers, name, scales)
        if tell is not None:
            tell(f"  {name}: {_counted(known[name].candidates)}")
    dense = len(layers) * sum(one.full for one in known.values())
    offered = {name: one.candidates for name, one in known.items()}
    search = Search(offered, len(layers), int(budget * dense), dense)
    while True:
        chosen = search.best()
        wanted = search.may_be_better(sum(loss for _, loss in chosen))
        if not wanted:
            return UnequalSharing(tuple(group for group, _ in chosen))
        now = wanted[: max(ROUND, len(wanted) // 2)]
        if tell is not None:
            tell(f"  a closer look at {len(now)} of {len(wanted)} groups that may be better than their estimates")
        for group in now:
            known[group.linear].decompose(group)


def require_budget(layers: Sequence[nn.Module], linears: Sequence[str], budget: float) -> None:
    """Check, by sizes alone, that some groups come within a budget; arguments are as of `choose_groups`.

    Raises:
        UserError: when none do; it names the nearest.
    """
    known = {name: LinearLosses(layers, name, None) for name in linears}
    dense = len(layers) * sum(one.full for one in known.values())
    Search({name: one.candidates for name, one in known.items()}, len(layers), int(budget * dense), dense)


def _counted(candidates: Sequence[Candidate]) -> str:
    shared = [group for group in candidates if group.count > 1]
    ranks, exact = sum(len(group.ranks) for group in shared), sum(group.exact for group in shared)
    return f"{len(shared):,} groups at {ranks:,} ranks, {exact:,} decomposed and {len(shared) - exact:,} estimated"


@dataclass
class Search:
    """The choice of candidates that cover all layers of every linear for at most so many parameters.

    A dynamic programme over (linear, layer, parameters): exact, but that parameters are counted in units that divide
    all costs, or, where these would be more than 20,000, in that many parts of the budget, rounded up.

    Args:
        offered: linear -> candidates of all its layers.
        layers: their number.
        budget: parameters.
        dense: parameters without any sharing, for the message.

    Attributes:
        unit: parameters of a unit.
        room: units of the budget.

    Raises:
        UserError: when even the smallest choice is larger.
    """

    offered: dict[str, list[Candidate]]
    layers: int
    budget: int
    dense: int | None = None

    def __post_init__(self) -> None:
        _require_reachable(self)
        every = [int(cost) for group in self._all() for cost in group.costs]
        self.unit = max(math.gcd(self.budget, *every), math.ceil(self.budget / UNITS))
        self.room = self.budget // self.unit

    def best(self) -> list[tuple[Group, float]]:
        """Return the groups of the best choice among exact candidates, and their losses.

        Raises:
            UserError: when the smallest choice fits, but not once its costs are rounded up.
        """
        before = self._losses_before(exact=True)
        left = self.room
        if not np.isfinite(before[-1][self.layers][left]):
            raise UserError(
                f"A budget of {self.budget:,} parameters is too near to the least that sharing takes: raise it."
            )
        found: list[tuple[Group, float]] = []
        for candidates, losses in zip(reversed(self.offered.values()), reversed(before), strict=True):
            end = self.layers
            while end:
                ending = [group for group in candidates if group.exact and group.end == end]
                _, group, place = min(self._ways(ending, losses, left), key=lambda way: way[0])
                found.append((group.group(place), float(group.losses[place])))
                left -= int(self._units(group)[place])
                end = group.first
        return found[::-1]

    def may_be_better(self, loss: float) -> list[Candidate]:
        """Return the estimated candidates with which a choice might come below a loss, the most promising first."""
        if all(group.exact for group in self._all()):
            return []
        before, after = self._losses_before(), self._losses_after()
        promising: list[tuple[float, Candidate]] = []
        for candidates, left, right in zip(self.offered.values(), before, after, strict=True):
            for group in candidates:
                if group.exact:
                    continue
                at_best = math.inf
                for own, cost in zip(group.losses, self._units(group), strict=True):
                    if cost <= self.room:
                        others = (
                            left[group.first][: self.room + 1 - cost] + right[group.end][: self.room + 1 - cost][::-1]
                        )
                        at_best = min(at_best, float(own + others.min()))
                if at_best < loss:
                    promising.append((at_best, group))
        return [group for _, group in sorted(promising, key=lambda pair: pair[0])]

    def _all(self) -> Iterator[Candidate]:
        return (group for candidates in self.offered.values() for group in candidates)

    def _units(self, group: Candidate) -> Integers:
        """Return the costs of a candidate, rounded up."""
        units: Integers = -(-group.costs // self.unit)
        return units

    def _ways(
        self, ending: Sequence[Candidate], losses: Sequence[Floats], left: int
    ) -> Iterator[tuple[float, Candidate, int]]:
        """Yield (loss so far, candidate, place of its rank) of all that may be the last of a choice of `left` units."""
        for group in ending:
            for place, cost in enumerate(self._units(group)):
                if cost <= left:
                    yield float(losses[group.first][left - cost] + group.losses[place]), group, place

    def _losses_before(self, exact: bool = False) -> list[list[Floats]]:
        """Return for every linear and layer the least loss of all before them, by the units that it may take.

        Entry L of a linear is that of all its layers. `exact`: leave estimated candidates out.
        """
        found: list[list[Floats]] = []
        start: Floats = np.zeros(self.room + 1)
        for candidates in self.offered.values():
            usable = [group for group in candidates if group.exact or not exact]
            losses = [start]
            for end in range(1, self.layers + 1):
                losses.append(self._least([(group, losses[group.first]) for group in usable if group.end == end]))
            found.append(losses)
            start = losses[-1]
        return found

    def _losses_after(self) -> list[list[Floats]]:
        """Return for every linear and layer the least loss of the layers from there on, and of the linears after it."""
        found: list[list[Floats]] = []
        start: Floats = np.zeros(self.room + 1)
        for candidates in reversed(self.offered.values()):
            losses: list[Floats] = [start] * (self.layers + 1)
            for first in reversed(range(self.layers)):
                losses[first] = self._least(
                    [(group, losses[group.end]) for group in candidates if group.first == first]
                )
            found.append(losses)
            start = losses[0]
        return found[::-1]

    def _least(self, ways: Sequence[tuple[Candidate, Floats]]) -> Floats:
        """Return the least loss of a candidate, at any rank, beside the losses of the others, by units."""
        best: Floats = np.full(self.room + 1, np.inf)
        for group, others in ways:
            for own, cost in zip(group.losses, self._units(group), strict=True):
                if cost <= self.room:
                    np.minimum(best[cost:], others[: self.room + 1 - cost] + own, out=best[cost:])
        return best


def _require_reachable(search: Search) -> None:
    least = 0
    for candidates in search.offered.values():
        smallest: list[float] = [0] + [math.inf] * search.layers
        for group in sorted(candidates, key=lambda group: group.end):
            smallest[group.end] = min(smallest[group.end], smallest[group.first] + int(group.costs.min()))
        least += int(smallest[search.layers])
    if least <= search.budget:
        return
    if least == search.dense:
        raise UserError(
            f"Sharing makes none of these linears smaller (layers: {search.layers}): every group takes as many "
            "parameters as its weights. Choose a model with more layers, or wider ones."
        )
    shares = ["", ""]
    if search.dense is not None:
        shares = [f" ({100 * size / search.dense:.2f} % of the linears)" for size in (search.budget, least)]
        shares[1] += f", --budget {math.ceil(1e4 * least / search.dense) / 1e4}"
    raise UserError(
        f"No sharing of these layers has as few as {search.budget:,} parameters{shares[0]}. The nearest has "
        f"{least:,}{shares[1]}."
    )
