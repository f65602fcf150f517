"""`adapter.budget`: the limits that a structure keeps, and what each slot of each layer may be within them."""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glora_llm.errors import UserError
from glora_llm.glora.path import SlotSpec
from glora_llm.glora.supernet import SlotChoices
from glora_llm.schema import AdapterSection
from glora_llm.schema.slots import DEFAULT_SLOTS, RANKED_MODES, SLOTS
from glora_llm.search.knapsack import Limit
from glora_llm.search.space import Code, Space, chosen

UNITS = {
    "": ("parameters", 1.0), "k": ("parameters", 1e3), "m": ("parameters", 1e6), "g": ("parameters", 1e9),
    "mb": ("megabytes", 1.0), "gb": ("megabytes", 1e3), "s": ("seconds", 1.0), "ms": ("seconds", 1e-3),
}  # fmt: skip
MOST_RANK = 255  # a code has a byte for each gene
LEAST_ROWS = 32  # below that, a gradient is of these samples and not of the task
SHARE, FEWEST, MOST = 0.02, 64, 256  # samples whose gradients are read: this share of those of the run, within these
STEPS_SHARE, FEWEST_STEPS, MOST_STEPS_SHARE = 0.05, 4, 0.25  # of a run's steps, which a short run before it has
KINDS_AT_ONCE = 14  # kinds of linears of which every subset is tried


class Budget(NamedTuple):
    """One limit as a user wrote it."""

    text: str
    unit: str  # parameters, seconds or megabytes
    most: float


def read_budget(value: Any) -> list[Budget]:
    """Return the limits of `adapter.budget`: `0.1M` parameters, `20ms` or `0.02s` a step, `12MB`; several by commas.

    Raises:
        UserError: for something that is no limit, and for two limits of one unit.
    """
    parts = value if isinstance(value, list) else str(value).split(",")
    found: list[Budget] = []
    for part in map(str, parts or [""]):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?\d+)?)\s*([a-zA-Z]*)\s*", part)
        if match is None or match[2].lower() not in UNITS or float(match[1]) <= 0:
            raise UserError(
                f"adapter.budget '{part.strip()}' is no limit; expected parameters (0.1M, 250k, 100000), what the "
                "slots add to a step (20ms, 0.02s) or to the memory (12MB)."
            )
        unit, factor = UNITS[match[2].lower()]
        if any(unit == other.unit for other in found):
            raise UserError(f"adapter.budget limits {unit} twice: {value}.")
        found.append(Budget(part.strip(), unit, float(match[1]) * factor))
    return found


def require_rows(section: AdapterSection, count: int) -> None:
    """Check that there are training samples enough for the predictor of a budget.

    Raises:
        UserError: for fewer than LEAST_ROWS where gradients are read.
    """
    if section.budget is None or section.predictor == "uniform":
        return
    if section.budget_rows is not None and section.budget_rows < LEAST_ROWS:
        raise UserError(f"adapter.budget_rows is {section.budget_rows}; a predictor needs {LEAST_ROWS} or more.")
    if count < LEAST_ROWS:
        raise UserError(
            f"adapter.predictor {section.predictor} needs gradients of {LEAST_ROWS} training samples or more, and "
            f"there are {count}: a choice by fewer is of these samples and not of the task. Set "
            "adapter.predictor=uniform."
        )


def rows_of(section: AdapterSection, trained: int) -> int:
    """Return how many samples a predictor reads the gradients of.

    Args:
        trained: samples that the run trains on, a sample of two epochs twice.
    """
    return section.budget_rows or min(max(FEWEST, round(SHARE * trained)), MOST)


def short_steps(section: AdapterSection, steps: int, global_batch: int) -> int:
    """Return the steps of the short run before a run of `steps`: 5 % of them, 4 at least, or what budget_rows says.

    Raises:
        UserError: for more than a quarter of the run.
    """
    share = max(FEWEST_STEPS, round(STEPS_SHARE * steps))
    rows = max(LEAST_ROWS, section.budget_rows or share * global_batch)
    found = max(2, math.ceil(rows / global_batch))
    if found > MOST_STEPS_SHARE * steps:
        raise UserError(
            f"adapter.predictor short_run trains {found} steps before the run, of {rows} samples, and the run has "
            f"{steps}: expected {math.ceil(found / MOST_STEPS_SHARE)} or more. Raise training.steps, or take another "
            "predictor, such as agreement or uniform."
        )
    return found


def check_short_run(section: AdapterSection, steps: int, global_batch: int, is_float16: bool) -> None:
    """Check that a run can have a short run before it, where its structure is chosen by one.

    Raises:
        UserError: for a run that is too short itself, and for float16.
    """
    if section.budget is None or section.predictor != "short_run":
        return
    if is_float16:  # its first steps overflow until the loss scale fits, and would leave gradients that are not finite
        raise UserError(
            "adapter.predictor short_run reads gradients while it trains, and those of float16 overflow in the first "
            "steps. Set model.dtype=bfloat16 or float32, or take another predictor, such as agreement."
        )
    short_steps(section, steps, global_batch)


def structure_choices(section: AdapterSection) -> SlotChoices:
    """Return what each slot may be: none, or its mode in adapter.slots with any rank up to adapter.rank.

    Raises:
        UserError: for a mode that gradients by thin sketches say nothing about, and for no slot to choose.
    """
    if section.rank > MOST_RANK:
        raise UserError(
            f"adapter.budget chooses among ranks up to adapter.rank, which is {section.rank}: {MOST_RANK} is the most."
        )
    slots: Any = section.slots or DEFAULT_SLOTS
    found: SlotChoices = {}
    for slot in SLOTS:
        given = slots.get(slot, "none")
        mode = given if isinstance(given, str) else given.mode
        if not isinstance(given, str) and (given.rank or given.alpha):
            raise UserError(f"adapter.budget chooses the ranks: slot {slot} has one of its own. Give adapter.rank.")
        if mode == "block" or (slot == "A" and mode == "lora" and section.composition == "hadamard"):
            raise UserError(
                f"adapter.budget chooses among products of thin factors, vectors and scalars, and slot {slot} is "
                f"{'in mode block' if mode == 'block' else 'a hadamard product'}: give it another mode, or none."
            )
        ranks = range(1, section.rank + 1) if mode in RANKED_MODES and slot != "C" else (1,)
        specs = [
            SlotSpec(mode, rank, _scale(section, rank)) if mode in RANKED_MODES else SlotSpec(mode) for rank in ranks
        ]
        found[slot] = (SlotSpec("none"), *(specs if mode != "none" else ()))
    if all(len(specs) == 1 for specs in found.values()):
        raise UserError("adapter.budget has no slot to choose: every one of adapter.slots is none.")
    if section.predictor in ("uniform", "short_run") and len(found["B"]) == 1:
        does = "gives slot B to every layer" if section.predictor == "uniform" else "trains slot B in a short run"
        raise UserError(f"adapter.predictor {section.predictor} {does}, and adapter.slots has none: add B.")
    return found


def _scale(section: AdapterSection, rank: int) -> float:
    return section.alpha / (rank**0.5 if section.rank_stabilized else rank)


def limits_of(space: Space, budgets: Sequence[Budget], costs: dict[str, NDArray[np.float64]]) -> list[Limit]:
    """Return the limits with the costs of every choice.

    Args:
        costs: unit -> (G, C).

    Raises:
        UserError: for a limit that no single choice keeps, naming the cheapest.
    """
    found = []
    for budget in budgets:
        table = costs[budget.unit]
        some = np.where(np.isfinite(table) & (space.parameters > 0), table, np.inf)
        gene, choice = np.unravel_index(some.argmin(), some.shape)
        if some[gene, choice] > budget.most:
            spec, place = space.genes[gene].specs[choice], space.genes[gene]
            what = f"{spec.mode} of rank {spec.rank}" if spec.rank else spec.mode
            raise UserError(
                f"adapter.budget {budget.text} is below the smallest structure, slot {place.slot} as {what} of "
                f"{space.layers[place.layer].name} alone, which costs {some[gene, choice]:,.4g} {budget.unit}. "
                "Raise it."
            )
        found.append(Limit(table, budget.most))
    return found


def cheapest(space: Space) -> Code:
    """Return the smallest structure: one slot of one layer, of the fewest parameters."""
    code = np.zeros(len(space.genes), np.uint8)
    some = np.where(space.parameters > 0, space.parameters, np.inf)
    gene, choice = np.unravel_index(some.argmin(), some.shape)
    code[gene] = choice
    return code


def fits(code: Code, limits: Sequence[Limit]) -> bool:
    """Tell whether a code is within all limits."""
    return all(float(chosen(limit.costs, code).sum()) <= limit.most for limit in limits)


def uniform(space: Space, limits: Sequence[Limit]) -> Code:
    """Return the structure that uses no gradients: slot B alone, of one rank everywhere, as large as fits.

    What is left buys one rank more for the kinds of linears (all `q_proj`, say) that use most of it. Where not even
    rank 1 fits everywhere, that is rank 1 of some kinds; where no kind fits, rank 1 of the cheapest kind in as many
    layers as fit, evenly spread.

    Raises:
        UserError: where not a single one fits.
    """
    genes = [row for row, gene in enumerate(space.genes) if gene.slot == "B"]
    kinds: dict[str, list[int]] = {}
    for row in genes:
        kinds.setdefault(space.layers[space.genes[row].layer].name.rpartition(".")[2], []).append(row)
    code = np.zeros(len(space.genes), np.uint8)
    most = len(space.genes[genes[0]].specs) - 1
    while code[genes[0]] < most and fits(raised := _raised(code, genes), limits):
        code = raised
    if code[genes[0]] < most:
        code = max(_fillings(code, list(kinds.values()), limits), key=lambda one: chosen(limits[0].costs, one).sum())
    return code if code.any() else _spread(code, list(kinds.values()), limits)


def _raised(code: Code, rows: Sequence[int]) -> Code:
    raised = code.copy()
    raised[list(rows)] += 1
    return raised


def _fillings(code: Code, kinds: Sequence[Sequence[int]], limits: Sequence[Limit]) -> list[Code]:
    """Return a code with one rank more in every subset of the kinds that fits."""
    some = kinds[:KINDS_AT_ONCE]
    subsets = itertools.chain.from_iterable(itertools.combinations(some, size) for size in range(len(some) + 1))
    found = [_raised(code, [row for kind in subset for row in kind]) for subset in subsets]
    return [one for one in found if fits(one, limits)]


def _spread(code: Code, kinds: Sequence[Sequence[int]], limits: Sequence[Limit]) -> Code:
    """Return rank 1 of the cheapest kind in as many layers as fit, evenly spread."""
    cheapest = min(kinds, key=lambda kind: float(limits[0].costs[kind, 1].sum()))
    for count in range(len(cheapest), 0, -1):
        places = sorted({round(place) for place in np.linspace(0, len(cheapest) - 1, count)})
        spread = _raised(code, [cheapest[place] for place in places])
        if fits(spread, limits):
            return spread
    raise UserError(
        "adapter.budget is below rank 1 of slot B of any layer, with which predictors uniform and short_run begin."
    )
