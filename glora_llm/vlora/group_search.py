"""The choice of groups with the least loss under a budget: a dynamic programme over the ways that may be of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glora_llm.errors import UserError
from glora_llm.vlora.group_losses import Candidate, Floats, Integers

UNITS = 20_000  # parts of the budget in which costs are counted, rounded up
PRICES = 120  # that are tried at most: halvings, after doublings
NEAR = 1e-9  # of a loss: what rounding may make of an equal one


@dataclass(frozen=True)
class Way:
    """A group at one of its ranks.

    Args:
        group: the group, at all ranks.
        place: of the rank.
        units: what it costs, rounded up.
        loss: of the group at this rank.
    """

    group: Candidate
    place: int
    units: int
    loss: float


class LinearWays:
    """All ways of one linear, as steps of paths from the first layer to behind the last one.

    Args:
        candidates: of all layers.
        layers: their number.
        unit: parameters of a unit.
    """

    def __init__(self, candidates: Sequence[Candidate], layers: int, unit: int) -> None:
        shape = (len(candidates), max(len(group.ranks) for group in candidates))
        self._candidates, self._layers = candidates, layers
        self.losses: Floats = np.full(shape, np.inf)  # inf where a group has fewer ranks
        self.units: Integers = np.zeros(shape, dtype=np.int64)
        for row, group in enumerate(candidates):
            self.losses[row, : len(group.ranks)] = group.losses
            self.units[row, : len(group.ranks)] = -(-group.costs // unit)
        self._first = np.array([group.first for group in candidates])
        self._end = np.array([group.end for group in candidates])
        self._beginning = [np.flatnonzero(self._first == layer) for layer in range(layers)]
        self._ending = [np.flatnonzero(self._end == layer) for layer in range(layers + 1)]

    def path(self, price: float) -> tuple[float, int]:
        """Return loss and units of the path with the least loss + price * units."""
        priced = self.losses + price * self.units
        places = priced.argmin(1)
        least = priced.min(1)
        before: Floats = np.zeros(self._layers + 1)
        last = [0] * (self._layers + 1)
        for end in range(1, self._layers + 1):
            sums = before[self._first[self._ending[end]]] + least[self._ending[end]]
            before[end], last[end] = sums.min(), int(self._ending[end][sums.argmin()])
        loss, units, end = 0.0, 0, self._layers
        while end:
            row = last[end]
            loss += float(self.losses[row, places[row]])
            units += int(self.units[row, places[row]])
            end = int(self._first[row])
        return loss, units

    def within(self, price: float, gap: float) -> list[Way]:
        """Return the ways that are on a path whose loss + price * units is at most `gap` above the least."""
        priced = self.losses + price * self.units
        least = priced.min(1)
        before, after = np.zeros(self._layers + 1), np.zeros(self._layers + 1)
        for end in range(1, self._layers + 1):
            before[end] = (before[self._first[self._ending[end]]] + least[self._ending[end]]).min()
        for first in reversed(range(self._layers)):
            after[first] = (after[self._end[self._beginning[first]]] + least[self._beginning[first]]).min()
        above = before[self._first][:, None] + priced + after[self._end][:, None] - before[-1]
        return [
            Way(self._candidates[row], int(place), int(self.units[row, place]), float(self.losses[row, place]))
            for row, place in zip(*np.nonzero(above <= gap), strict=True)
        ]


@dataclass
class Search:
    """The choice of candidates that cover all layers of every linear for at most so many parameters.

    A dynamic programme over (linear, layer, parameters): exact, but that parameters are counted in units that divide
    all costs, or, where these would be more than 20,000, in that many parts of the budget, rounded up. Ways that no
    best choice can have are left out of it, which makes it quick.

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
        every = [int(cost) for candidates in self.offered.values() for group in candidates for cost in group.costs]
        self.unit = max(math.gcd(self.budget, *every), math.ceil(self.budget / UNITS))
        self.room = self.budget // self.unit

    def best(self) -> list[Way]:
        """Return the ways of the best choice, by the losses that candidates have now.

        Raises:
            UserError: when the smallest choice fits, but not once its costs are rounded up.
        """
        linears = [LinearWays(candidates, self.layers, self.unit) for candidates in self.offered.values()]
        price, gap = self._price(linears)
        ways = [linear.within(price, gap) for linear in linears]
        before: list[list[Floats]] = []
        start: Floats = np.zeros(self.room + 1)
        for mine in ways:
            losses = [start]
            for end in range(1, self.layers + 1):
                losses.append(self._least([(way, losses[way.group.first]) for way in mine if way.group.end == end]))
            before.append(losses)
            start = losses[-1]
        return self._followed_back(ways, before)

    def _price(self, linears: Sequence[LinearWays]) -> tuple[float, float]:
        """Return a price of a unit, and how far above the least a way of the best choice may come at that price.

        For any price p >= 0, the least of loss + p units over all choices, less p times the room, is at most the loss
        of any choice that fits (Lagrangian relaxation), and it is a shortest path over the layers of each linear. With
        a way forced into the choice it bounds those that have it: where it comes above a loss that is reached, the way
        can be left out. The price is the one with the highest bound.

        Raises:
            UserError: when no price makes the choice small enough: it does not fit once costs are rounded up.
        """
        largest = max(float(linear.losses[np.isfinite(linear.losses)].max()) for linear in linears)
        low, high = 0.0, max(largest, 1e-30) / self.room
        price, best, bound, reached = 0.0, 0.0, -math.inf, math.inf
        for _ in range(PRICES):
            paths = [linear.path(price) for linear in linears]
            loss, units = sum(path[0] for path in paths), sum(path[1] for path in paths)
            if loss + price * (units - self.room) > bound:
                bound, best = loss + price * (units - self.room), price
            if units <= self.room:
                high, reached = price, min(reached, loss)
            else:
                low, high = price, high if math.isfinite(reached) else 2 * high
            if math.isinf(reached):
                price = high
                continue
            if reached - bound <= NEAR * reached:
                break
            price = (low + high) / 2
        if math.isinf(reached):
            raise UserError(
                f"A budget of {self.budget:,} parameters is too near to the least that sharing takes: raise it."
            )
        return best, reached - bound + NEAR * (reached + best * self.room)

    def _least(self, ways: Sequence[tuple[Way, Floats]]) -> Floats:
        """Return the least loss of a way beside the losses of the others, by units."""
        best: Floats = np.full(self.room + 1, np.inf)
        for way, others in ways:
            if way.units <= self.room:
                part = best[way.units :]
                np.minimum(part, others[: self.room + 1 - way.units] + way.loss, out=part)
        return best

    def _followed_back(self, ways: Sequence[Sequence[Way]], before: Sequence[Sequence[Floats]]) -> list[Way]:
        """Return the ways that lead to the least loss in all of the room, given the least losses by units."""
        left, found = self.room, list[Way]()
        for mine, losses in zip(reversed(ways), reversed(before), strict=True):
            end = self.layers
            while end:
                fitting = [way for way in mine if way.group.end == end and way.units <= left]
                sums = [float(losses[way.group.first][left - way.units]) + way.loss for way in fitting]
                found.append(fitting[int(np.argmin(sums))])
                left -= found[-1].units
                end = found[-1].group.first
        return found[::-1]


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
