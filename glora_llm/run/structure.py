"""Choose slots, ranks and targets of every layer before the first step, within `adapter.budget`.

The base is loaded with an adapter that changes nothing, under the run's own DeepSpeed configuration. Gradients of some
training samples pass by as thin sketches (`glora.sketch`), are summed over the processes, and are scored
(`search.predictors`); the choice is a knapsack (`search.knapsack`). What was chosen is a genome like any other: the run
goes on as if the recipe had named it, and so does every later launch.
"""

import gc
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed as dist

from glora_llm.adapters.budgeted import structure_space
from glora_llm.adapters.even import factor, sizes_of
from glora_llm.adapters.inject import adapted_layers, inject, without_adapter
from glora_llm.adapters.weights import trainables
from glora_llm.data.sampler import permutation
from glora_llm.errors import UserError
from glora_llm.glora.layer import GLoRALinear
from glora_llm.glora.learning_rates import DEFAULT_LR_FACTORS
from glora_llm.glora.path import Genome, SlotSpec, genome_from_json, genome_to_json
from glora_llm.glora.sketch import Probe, Sketch
from glora_llm.launch import ranks
from glora_llm.launch.ranks import Processes
from glora_llm.models import load
from glora_llm.models.load import compute_dtype
from glora_llm.plan.plan import Plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.report import search_figures
from glora_llm.run.build import shards_of
from glora_llm.schema import AdapterSection
from glora_llm.search import cost
from glora_llm.search.budget import LEAST_ROWS, Budget, limits_of, read_budget, uniform
from glora_llm.search.knapsack import choose
from glora_llm.search.predictors import OF_HALVES, PREDICTORS, Gradients, LayerGradients, scores
from glora_llm.search.space import Code, LayerShape, Space
from glora_llm.training.engine import Engine
from glora_llm.training.loop import peak_memory_gb
from glora_llm.vlora.partitioned import whole

ROWS_STREAM = 43  # of the seeded choice of the samples


@dataclass(frozen=True)
class Structure:
    """What was chosen, and by what.

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
    layers, gradients = _measured(plan, processes) if predictor != "uniform" else (_meta_layers(plan), {})
    space = structure_space(layers, section)
    told: Any = None
    if processes.is_main_process:
        try:
            told = _solve(plan, space, budgets, gradients, processes.device)
        except UserError as error:
            told = error
    told = ranks.broadcast(told, processes.device)
    if isinstance(told, UserError):
        raise told
    code, table, solved = told
    parameters = np.array([space.parameters[row, choice] for row, choice in enumerate(code)])
    shares = dict.fromkeys((layer.name for layer in space.layers), 0)
    for gene, count in zip(space.genes, parameters, strict=True):
        shares[space.layers[gene.layer].name] += int(count)
    values = {
        "predictor": predictor,
        "budget": [budget.text for budget in budgets],
        "parameters": int(parameters.sum()),
        **solved,
        "samples": len(_rows(plan)) if gradients else 0,
        "seconds": time.perf_counter() - began,
        "peak_memory_gb": peak_memory_gb(processes.device),
    }
    return Structure(space.genome(code), values, _named(space, table), shares)


def _solve(
    plan: Plan, space: Space, budgets: list[Budget], gradients: Mapping[str, LayerGradients], device: torch.device
) -> tuple[Code, NDArray[np.float64] | None, dict[str, Any]]:
    """Return the code, the scores that it was chosen by (None of uniform), and what they come to."""
    limits = limits_of(space, budgets, _costs(plan, space, budgets, device))
    used = {}
    if not gradients:
        code, table = uniform(space, limits), None
    else:
        table = scores(space, gradients, PREDICTORS.get(plan.recipe.adapter.predictor))
        best = choose(table, limits)
        code, used = best.code, {"score": best.score, "bound": best.bound}
    rows = np.arange(len(code))
    spent = {budget.unit: float(limit.costs[rows, code].sum()) for budget, limit in zip(budgets, limits, strict=True)}
    return code, table, used | {"spent": spent}


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


def _rows(plan: Plan) -> list[int]:
    """Return the numbers of the samples that are looked at, in a seeded order."""
    order = permutation(len(plan.task.train), plan.recipe.training.seed, ROWS_STREAM)
    return [int(row) for row in order[: max(LEAST_ROWS, plan.recipe.adapter.budget_rows)]]


def _meta_layers(plan: Plan) -> dict[str, GLoRALinear]:
    """Return the adapted layers of the model without weights."""
    bare = load.meta_model(plan.recipe.model, plan.base.folder)
    return adapted_layers(inject(bare, _silent(plan.recipe.adapter), plan.recipe.training.seed, plan.steps))


def _silent(section: AdapterSection) -> AdapterSection:
    """Return an adapter on the same targets that costs nearly nothing and is never trained."""
    changes = {"budget": None, "slots": {"E": "vector"}, "dropout": 0.0, "scaling": "alpha", "lr_factors": None}
    return section.model_copy(update=changes)


def _measured(plan: Plan, processes: Processes) -> tuple[dict[str, GLoRALinear], dict[str, LayerGradients]]:
    """Return the layers without their weights, and the gradients of each, of the samples of all processes."""
    recipe, device, rows = plan.recipe, processes.device, _rows(plan)
    silent = _silent(recipe.adapter)
    base = load.load_base(recipe.model, plan.base.folder, device, shards_of(plan))
    model = inject(base, silent, recipe.training.seed, plan.steps)
    layers = adapted_layers(model)
    structure_space(layers, recipe.adapter)  # refuses other layers before anything is computed
    objective = plan.task.objective(without_adapter(model))
    engine = Engine(objective, trainables(model, silent, 1.0), recipe.training, plan.deepspeed, device)
    try:
        probe = Probe(layers, recipe.adapter.rank, recipe.training.seed, lambda layer: whole(layer.parameters()))
        _see(plan, probe, engine, rows, processes)
        engine.release()
        probe.sum_over(dist.all_reduce)
        found = {name: _of_layer(probe, name, recipe.adapter) for name in layers}
    finally:
        engine.close()
    del engine, objective, model, base, probe, layers
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return _meta_layers(plan), found


def _see(plan: Plan, probe: Probe, engine: Engine, rows: list[int], processes: Processes) -> None:
    """Let the gradients of the samples pass by: batches are cut alike however many processes share them."""
    # in evaluation mode all activations are kept: a model that is trained with checkpointing gets row by row
    size = 1 if plan.recipe.model.gradient_checkpointing else plan.recipe.training.micro_batch
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    for first in range(0, len(batches), processes.world_size):
        number = first + processes.process_rank
        batch = plan.batch(plan.task.train, batches[min(number, len(batches) - 1)])
        # a process without a batch keeps step, and adds nothing: divided layers need all processes
        probe.see(lambda batch=batch: engine.loss(batch), number % 2 if number < len(batches) else None)  # type: ignore[misc]


def _of_layer(probe: Probe, name: str, section: AdapterSection) -> LayerGradients:
    layer, sums = probe.layers[name], probe.sums[name]
    sizes = sizes_of(layer)
    with probe.weight(layer) as weight:
        w0, squared = weight.double(), weight.double().square()
    parts = sums if section.predictor in OF_HALVES else [sums[0].plus(sums[1])]
    found = tuple(_gradients(probe, name, sketch, w0, squared) for sketch in parts)
    factors = {
        slot: {mode: factor(slot, mode, section.composition, sizes) for mode in ("lora", "vector", "scalar")}
        if section.scaling == "even"
        else dict.fromkeys(("lora", "vector", "scalar"), lr_factor)
        for slot, lr_factor in DEFAULT_LR_FACTORS.items()
    }
    return LayerGradients(found, factors)


@torch.no_grad()
def _gradients(probe: Probe, name: str, sketch: Sketch, w0: torch.Tensor, squared: torch.Tensor) -> Gradients:
    """Return what the predictors read, in float64 on the CPU.

    Args:
        w0: in float64, and its squares.
    """
    bias = probe.biases[name]
    of_b, of_a = probe.directions(name, sketch), probe.directions_through(name, sketch, w0)
    dy, gain, shift = sketch.squares.double()
    inputs, tokens = sketch.inputs.double(), float(sketch.tokens)
    through = w0 @ of_a.left
    noise = {
        "B": (of_b.left.square().t() @ dy) * (of_b.right.square() @ inputs) / tokens,
        "A": (through.square().t() @ dy) * (of_a.right.square() @ inputs) / tokens,
    }
    vectors = {"A": sketch.gains, "B": sketch.shifts, "C": w0.t() @ sketch.total.double(), "E": sketch.total}
    squares = {"A": gain, "B": shift, "C": squared.t() @ dy, "E": dy}
    if bias is not None:
        vectors["D"], squares["D"] = bias * sketch.total, bias.double().square() * dy
    return Gradients(
        {slot: low._replace(**{key: value.cpu() for key, value in low._asdict().items()}) for slot, low in
         (("A", of_a), ("B", of_b))},
        {slot: value.cpu() for slot, value in noise.items()},
        {slot: value.double().cpu() for slot, value in vectors.items()},
        {slot: value.cpu() for slot, value in squares.items()},
    )  # fmt: skip


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
