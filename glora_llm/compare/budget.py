"""Bring each method to a number of trained parameters, counted on models without weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from glora_llm.adapters.inject import inject
from glora_llm.compare.contenders import Contender
from glora_llm.errors import UserError
from glora_llm.models.load import meta_model
from glora_llm.plan.checks import check_ranks
from glora_llm.plan.plan import Plan
from glora_llm.plan.prompt_checks import check_room
from glora_llm.plan.step_memory import without_start
from glora_llm.plan.trained_counts import trained_counts
from glora_llm.schema import AdapterSection

TOLERANCE = 0.25  # share of the budget by which the nearest may miss it
MOST = 65_536  # a knob's largest value
FLAT = 4  # a knob that changes nothing up to so many times its value is taken to change nothing
COUNTS = 60  # models that are counted for one method at most


@dataclass(frozen=True)
class Fit:
    """A method at the value of its knob that comes nearest to the budget.

    Args:
        value: of the knob; None: the method has none.
        parameters: that are trained.
    """

    value: int | None
    parameters: int


def parameters_of(plan: Plan, section: AdapterSection) -> int:
    """Return how many parameters an adapter section trains; the model is built without weights.

    Raises:
        UserError: where the method, or this value of its knob, does not fit the model.
    """
    bare = meta_model(plan.recipe.model, plan.base.folder)
    recipe = plan.recipe.model_copy(update={"adapter": section})
    check_ranks(recipe, bare, None)
    check_room(recipe, bare.config)
    return trained_counts(inject(bare, without_start(section), plan.recipe.training.seed, plan.steps, None)).total


def nearest_value(count: Callable[[int], int], budget: int, most: int = MOST) -> Fit:
    """Return the value of a knob whose count is nearest to the budget; of two equally near ones the smaller count.

    Args:
        count: value -> trained parameters, rising or falling; raises UserError for a value that the method rejects.
        budget: trained parameters.
        most: the largest value to try.

    Raises:
        UserError: when the method rejects every value, as at the first one.
    """
    search = _Search(count, budget, most)
    low = search.first()
    high = search.beyond(low)
    while high is not None and abs(high - low) > 1 and len(search.known) < COUNTS:
        guess = search.between(low, high, halve=len(search.known) % 2 == 1)
        if guess is None:
            break
        low, high = (guess, high) if search.is_below(guess) == search.is_below(low) else (low, guess)
    counts = {value: found for value, found in search.known.items() if found is not None}
    best = min(counts, key=lambda value: (abs(counts[value] - budget), counts[value]))
    return Fit(best, counts[best])


class _Search:
    """Bisection over the values of a knob; the count is nearly a line, so the next guess is on it.

    Attributes:
        known: value -> count; None where the method rejects it.
    """

    def __init__(self, count: Callable[[int], int], budget: int, most: int):
        self.count, self.budget, self.most = count, budget, most
        self.known: dict[int, int | None] = {}
        self.refused = ""

    def at(self, value: int) -> int | None:
        """Return the count at a value."""
        if value not in self.known:
            try:
                self.known[value] = self.count(value)
            except UserError as error:
                self.known[value], self.refused = None, self.refused or str(error)
        return self.known[value]

    def is_below(self, value: int) -> bool:
        """Tell whether a value that the method takes stays below the budget."""
        found = self.at(value)
        assert found is not None
        return found < self.budget

    def first(self) -> int:
        """Return the smallest power of two that the method takes."""
        value = 1
        while self.at(value) is None:
            value *= 2
            if value > self.most:
                raise UserError(self.refused)
        return value

    def beyond(self, low: int) -> int | None:
        """Return a value on the other side of the budget; None where larger ones lead away from it, or are refused."""
        before, value = low, 2 * low
        while value <= self.most:
            found, start = self.at(value), self.at(before)
            assert start is not None
            if found is not None and found != start:
                if self.is_below(value) != self.is_below(low):
                    return value
                if abs(found - self.budget) >= abs(start - self.budget):
                    return None
                slope = (found - start) / (value - before)
                met = value + math.ceil((self.budget - found) / slope)  # where the line meets the budget
                before, value = value, max(value + 1, min(met, self.most))
            elif found is not None and value >= FLAT * before:
                return None
            elif found is not None or 2 * before not in self.known:
                value = 2 * (before if found is None else value)  # no divisor of a width, or no more than before
            elif value - before > 1:
                value = (before + value) // 2  # too large for the layers: nearer
            else:
                return None
        return None

    def between(self, low: int, high: int, halve: bool) -> int | None:
        """Return a value between two that the method takes: on the line of their counts, or in the middle."""
        start, end = self.at(low), self.at(high)
        assert start is not None and end is not None
        share = (self.budget - start) / (end - start) if end != start and not halve else 0.5
        inner = range(min(low, high) + 1, max(low, high))
        guess = min(max(round(low + share * (high - low)), inner.start), inner.stop - 1)
        tries = sorted(inner, key=lambda value: abs(value - guess))[:8] if len(inner) < 4096 else [guess]
        return next((value for value in tries if self.at(value) is not None), None)


def solve(plan: Plan, contender: Contender, section: Callable[[int | None], AdapterSection], budget: int | None) -> Fit:
    """Return a method at its budget.

    Args:
        plan: of the recipe: model and number of steps.
        section: value of the knob -> adapter section.
        budget: trained parameters; None: the recipe's own rank.

    Raises:
        UserError: where the method does not fit the model.
    """
    if budget is None or contender.knob is None:
        value = section(None).rank if contender.knob == "rank" else None
        return Fit(value, parameters_of(plan, section(None)))
    if contender.knob == "budget":  # the number itself; what gradients choose costs about what is counted here
        return Fit(budget, parameters_of(plan, section(budget)))
    return nearest_value(lambda value: parameters_of(plan, section(value)), budget)


def require_near(fits: dict[Contender, Fit], budget: int) -> None:
    """Check that every method that has a knob comes near to the budget.

    Raises:
        UserError: naming the nearest for each, and a budget that all of them can meet.
    """
    tuned = {contender: fit for contender, fit in fits.items() if contender.knob}
    far = [one for one, fit in tuned.items() if abs(fit.parameters - budget) > TOLERANCE * budget]
    if not far:
        return
    listed = "; ".join(f"{one.name} {fit.parameters:,} ({one.knob} {fit.value})" for one, fit in tuned.items())
    above = [fit.parameters for one, fit in tuned.items() if fit.parameters > budget]
    advice = f"--budget {max(above)}" if above else "a smaller --budget"
    raise UserError(
        f"--budget {budget:,} is met within {TOLERANCE:.0%} by no value of {', '.join(one.name for one in far)}. "
        f"Nearest: {listed}. Give {advice}, fewer modules for all methods ('adapter.targets=[q_proj, v_proj]'), or "
        "--nearest, which takes each method at its nearest."
    )
