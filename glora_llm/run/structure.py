"""Choose slots, ranks and targets of every layer before the first step, within `adapter.budget`.

Gradients of some training samples (`run.gradients`), at the base's weights or along a short run, are scored
(`search.predictors`); the choice is a knapsack (`search.knapsack`). What was chosen is a genome like any other: the run
goes on as if the recipe had named it, and so does every later launch.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from glora_llm.adapters.budgeted import structure_space
from glora_llm.errors import UserError
from glora_llm.glora.path import Genome, SlotSpec, genome_from_json, genome_to_json
from glora_llm.launch import ranks
from glora_llm.launch.ranks import Processes
from glora_llm.models.load import compute_dtype
from glora_llm.plan.plan import Plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.report import search_figures
from glora_llm.run.gradients import Measured, measured, meta_layers
from glora_llm.search import cost
from glora_llm.search.budget import Budget, limits_of, read_budget, uniform
from glora_llm.search.knapsack import Limit, choose
from glora_llm.search.predictors import OF_COURSE, PREDICTORS, scores
from glora_llm.search.space import Code, LayerShape, Space
from glora_llm.training.loop import peak_memory_gb

T = TypeVar("T")


@dataclass(frozen=True)
class Structure:
    """A chosen structure, with the scores that it was chosen by.

    Args:
        genome: the slots of every layer.
        values: of RUN/structure/choice.json.
        table: layer -> slot -> choice -> score; empty for uniform.
        shares: layer -> trained parameters.
    """

    genome: Genome
    values: dict[str, Any]
    table: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    shares: dict[str, int] = field(default_factory=dict)

    def write(self, folder: RunFolder) -> None:
        """Write RUN/structure with scores and figures, and RUN/genome.json last: with it, the choice is made."""
        place = folder.path / "structure"
        place.mkdir(parents=True, exist_ok=True)
        figures = {"modes": search_figures.modes(self.genome), "sizes": search_figures.sizes(self.shares)}
        for name, figure in figures.items():
            figure.savefig(place / f"{name}.png", dpi=150)
        folder.write("structure/scores.json", json.dumps(self.table, indent=1) + "\n")
        folder.write("structure/choice.json", json.dumps(self.values, indent=1) + "\n")
        folder.write("genome.json", genome_to_json(self.genome))


def choose_structure(plan: Plan, folder: RunFolder, processes: Processes) -> tuple[Plan, Structure | None]:
    """Return a plan with the genome that its budget is spent on, and what is to be written of it (once).

    Raises:
        UserError: for a budget that nothing fits into.
    """
    if plan.recipe.adapter.budget is None:
        return plan, None
    there = processes.is_main_process and (folder.path / "recipe.yaml").is_file() and folder.genome.is_file()
    text = folder.genome.read_text(encoding="utf-8") if there else None
    text = ranks.broadcast(text, processes.device)
    if text is not None:
        return replace(plan, genome=genome_from_json(text)), None
    structure = _choose(plan, processes)
    return replace(plan, genome=structure.genome), structure


def _choose(plan: Plan, processes: Processes) -> Structure:
    recipe, began = plan.recipe, time.perf_counter()
    section = recipe.adapter
    budgets, predictor = read_budget(section.budget), section.predictor
    space = structure_space(meta_layers(plan), section)
    start = _by_main_process(lambda: _start(plan, space, budgets, processes.device), processes)
    code, table = start.even, None
    found: dict[str, Any] = {"samples": 0}
    if predictor != "uniform":
        short = None if start.even is None else space.genome(start.even)
        seen = measured(plan, processes, short)
        code, table, found = _by_main_process(lambda: _solve(plan, space, start.limits, seen), processes)
        found |= {"samples": seen.samples} | ({"losses": seen.losses} if short else {})
    assert code is not None
    rows = np.arange(len(code))
    parameters = space.parameters[rows, code]
    shares = dict.fromkeys((layer.name for layer in space.layers), 0)
    for gene, count in zip(space.genes, parameters, strict=True):
        shares[space.layers[gene.layer].name] += int(count)
    pairs = zip(budgets, start.limits, strict=True)
    values = {
        "predictor": predictor,
        "budget": [budget.text for budget in budgets],
        "parameters": int(parameters.sum()),
        **found,
        "spent": {budget.unit: float(limit.costs[rows, code].sum()) for budget, limit in pairs},
        "seconds": time.perf_counter() - began,
        "peak_memory_gb": peak_memory_gb(processes.device),
    }
    return Structure(space.genome(code), values, _named(space, table), shares)


def _by_main_process(work: Callable[[], T], processes: Processes) -> T:
    """Return on all processes what the main process computes.

    Raises:
        UserError: on all processes, where the main process raises it.
    """
    told: Any = None
    if processes.is_main_process:
        try:
            told = work()
        except UserError as error:
            told = error
    told = ranks.broadcast(told, processes.device)
    if isinstance(told, UserError):
        raise told
    found: T = told
    return found


class _Start(NamedTuple):
    """The space and its limits, known before any gradient."""

    limits: list[Limit]
    even: Code | None  # the structure of predictor uniform, where that or a short run of it is wanted


def _start(plan: Plan, space: Space, budgets: list[Budget], device: torch.device) -> _Start:
    limits = limits_of(space, budgets, _costs(plan, space, budgets, device))
    is_even = plan.recipe.adapter.predictor in ("uniform", *OF_COURSE)
    return _Start(limits, uniform(space, limits) if is_even else None)


def _solve(
    plan: Plan, space: Space, limits: list[Limit], seen: Measured
) -> tuple[Code, NDArray[np.float64], dict[str, Any]]:
    """Return the code of the largest score, the scores, and what they come to."""
    predictor = plan.recipe.adapter.predictor
    table = scores(space, seen.layers, PREDICTORS.get(predictor))
    best = choose(table, limits)
    if not best.code.any():
        raise UserError(
            f"adapter.predictor {predictor} finds no slot that is worth anything: by {seen.samples} samples all "
            "gradients are noise. Raise adapter.budget_rows, or set adapter.predictor=uniform."
        )
    return best.code, table, {"score": best.score, "bound": best.bound}


def _costs(plan: Plan, space: Space, budgets: list[Budget], device: torch.device) -> dict[str, NDArray[np.float64]]:
    """Return the cost of each choice in each unit that is limited; seconds and megabytes are measured."""
    found = {"parameters": space.parameters}
    units = [budget.unit for budget in budgets if budget.unit != "parameters"]
    if not units:
        return found
    recipe = plan.recipe
    tokens = recipe.training.micro_batch * recipe.data.max_tokens
    measured = cost.measure(space, tokens, compute_dtype(recipe.model, device), device)
    for unit in units:

        def value(layer: LayerShape, slot: str, spec: SlotSpec, unit: str = unit) -> float:
            return measured[cost.cost_key(layer, slot, spec)][unit]

        found[unit] = Space(space.layers, space.choices, space.composition, value).costs
    return found


def _named(space: Space, table: NDArray[np.float64] | None) -> dict[str, dict[str, dict[str, float]]]:
    """Return the scores by layer, slot and choice (`lora 4`, `vector`)."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row, gene in enumerate(space.genes if table is not None else ()):
        assert table is not None
        names = [f"{spec.mode} {spec.rank}" if spec.rank else spec.mode for spec in gene.specs]
        pairs = zip(names, table[row], strict=False)
        found.setdefault(space.layers[gene.layer].name, {})[gene.slot] = {
            name: float(score) for name, score in pairs if name != "none"
        }
    return found
