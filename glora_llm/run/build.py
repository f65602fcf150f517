"""Build what a run trains with: model, adapter, engine and saver, from the newest checkpoint where there is one."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glora_llm.adapters.config import reads_base
from glora_llm.adapters.even import even_scales, set_scales
from glora_llm.adapters.inject import (
    inject,
    match_frozen_tensors,
    searched_layers,
    tuner_layers,
    without_adapter,
)
from glora_llm.adapters.start import saved_config
from glora_llm.adapters.stateful import load_state, stateful_method
from glora_llm.adapters.weights import load_start, require_same_frozen, trainables
from glora_llm.errors import UserError
from glora_llm.glora.path_sampler import Supernet
from glora_llm.launch import ranks
from glora_llm.launch.ranks import Processes
from glora_llm.models import load
from glora_llm.models.families import layers
from glora_llm.models.resolve import resolve
from glora_llm.models.sharded_load import Shards
from glora_llm.plan.plan import Plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.run.resumed import Resumed, describe_changes, layout
from glora_llm.run.saving import Clock, Saver
from glora_llm.schema import AdapterSection, DistillSection, Recipe, SupernetSection
from glora_llm.training import checkpoint
from glora_llm.training.best import Best
from glora_llm.training.distill import DistilledObjective
from glora_llm.training.engine import Engine
from glora_llm.training.flops import ModelCost, measure_cost
from glora_llm.training.loop import peak_memory_gb
from glora_llm.training.optim import Trainable
from glora_llm.training.sharding import element_count, set_whole, undivided, whole_shape
from glora_llm.vlora import vlora_layers
from glora_llm.vlora.rates import Rate, rates


@dataclass(frozen=True)
class TrainingParts:
    """Everything that a run trains with, on one process.

    Args:
        model: the model that `adapters.inject` returned.
        trained: number of its trained parameters.
        engine: the model under DeepSpeed.
        cost: floating-point operations of a step.
        supernet: the layers whose paths are drawn; none where the recipe fixes the paths.
        vlora_stack: the layers of a VLoRA model that is trained as a whole, else none.
        saver: writes checkpoints and the final weights.
        clock: of the run.
        start: optimizer steps that are done already.
        changes: what differs from the launch that did them, in words.
        load_peak_gb: the most memory that building all of this took, GB.
        best: of the validations.
    """

    model: Any
    trained: int
    engine: Engine
    cost: ModelCost
    supernet: Supernet
    vlora_stack: list[nn.Module]
    saver: Saver
    clock: Clock
    start: int
    changes: list[str]
    load_peak_gb: float
    best: Best


def build(plan: Plan, folder: RunFolder, processes: Processes) -> TrainingParts:
    """Load the base, inject the adapter, read the newest checkpoint, and start the engine.

    Raises:
        UserError: when the checkpoint is of other parameters or other data, or the disk has no room for another.
    """
    began, recipe, device = time.time(), plan.recipe, processes.device
    data_digest = plan.task.train.digest()  # reads all training data: once a launch
    ranks.require_equal({"training data": data_digest, "base model": plan.base.fingerprint}, processes.world_size)
    base = load.load_base(recipe.model, plan.base.folder, device, shards_of(plan))
    model = inject(base, recipe.adapter, recipe.training.seed, plan.steps, plan.genome)
    items = _rated(trainables(model, recipe.adapter, recipe.training.loraplus_ratio), without_adapter(model), recipe)
    trained = sum(element_count(item.parameter) for item in items)
    size = checkpoint.size(trained, has_adapter=not recipe.adapter.is_full)
    checkpoint.require_space(folder.checkpoints, size, recipe.output.keep + bool(recipe.evaluation.keep_best))

    dtype, bare = load.compute_dtype(recipe.model, device), without_adapter(model)
    cost = measure_cost(bare, base.config, dtype, device, plan.task.causal)
    resumed = _read_checkpoint(plan, folder, processes, [item.name for item in items], data_digest)
    _set_weights(model, items, resumed, recipe.adapter)

    method = stateful_method(model, recipe.adapter)
    penalty = method.penalty_gradients() if method else None
    if recipe.model.compile:
        load.compile_layers(bare)
    supernet = _supernet(plan, model)
    objective = objective_of(plan, bare, device, supernet)
    engine = Engine(objective, items, recipe.training, plan.deepspeed, device, penalty)
    match_frozen_tensors(model)
    if engine.stage == 3 and recipe.adapter.method == "deft":
        _gather_biases(model)
    if method is not None:
        method.attach(engine.whole)
        engine.after_step = method.step
    start, changes, clock, best = 0, [], Clock(began), Best.of(recipe.evaluation)
    if resumed is not None:
        now = layout(recipe, engine.stage, engine.world_size)
        changes = describe_changes(resumed.trainer.get("layout", {}), now, recipe)
        start, clock = int(resumed.trainer["step"]), Clock(began, resumed.trainer["seconds"])
        engine.restore(resumed.tensors, resumed.trainer["applied"], resumed.trainer.get("loss_scale", {}))
        if method is not None:
            load_state(method, resumed.folder / "adapter")
        best.load_state_dict(resumed.trainer.get("best", {}))
    saver = Saver(plan, folder, model, method, processes.is_main_process, data_digest, clock, best)
    vlora_stack = list(layers(bare)) if recipe.adapter.is_full and vlora_layers(bare) else []
    load_peak_gb = peak_memory_gb(device)
    return TrainingParts(
        model, trained, engine, cost, supernet, vlora_stack, saver, clock, start, changes, load_peak_gb, best
    )


def _gather_biases(model: Any) -> None:
    """Let ZeRO 3 hold the base's biases whole while DEFT's layers compute: they read them behind the base's own."""
    from deepspeed.runtime.zero import register_external_parameter

    for layer in tuner_layers(model).values():
        bias = getattr(layer.get_base_layer(), "bias", None)
        if bias is not None:
            register_external_parameter(layer, bias)


def describe_parts(parts: TrainingParts, adapter: AdapterSection, world_size: int) -> list[str]:
    """Return what each process holds, and a warning where ZeRO 3 leaves or left the model whole, line by line."""
    held = parts.engine.held()
    scales = f", {held.scales / 1e6:.1f} MB of them scales of quantised weights" if held.scales else ""
    lines = [
        f"{held.bytes / 1e6:.1f} MB of parameters on each of {world_size} processes{scales}",
        f"peak of memory while loading: {parts.load_peak_gb:.2f} GB",
    ]
    if parts.engine.stage == 3 and reads_base(adapter):
        lines.append(f"every process held the whole base at first: adapter.method {adapter.method} may read it")
    if parts.engine.stage == 3 and (warning := undivided(held, world_size)):
        lines.append(f"warning: {warning}")
    return lines


def objective_of(plan: Plan, model: Any, device: torch.device, supernet: Supernet) -> Any:
    """Return the task's objective for a model, with a teacher on the same device where the recipe has one.

    Args:
        supernet: whose largest path may be the teacher.
    """
    objective, settings = plan.task.objective(model), plan.recipe.training.distill
    drawn = plan.recipe.adapter.supernet
    if drawn is not None and drawn.distill is not None:
        own = DistillSection(teacher="", weight=drawn.distill)
        return DistilledObjective(objective, None, own, supernet.as_teacher)
    if settings is None or plan.teacher is None:
        return objective
    teacher = load.load_base(settings.as_model(), plan.teacher.folder, device)
    return DistilledObjective(objective, plan.task.objective(teacher), settings)


def reference_objective(plan: Plan, objective: Any, device: torch.device) -> tuple[str, Any] | None:
    """Return the model that this one is measured by, as (`teacher` or `dense`, its objective); None: there is none.

    Args:
        objective: of the model that is trained.
    """
    if isinstance(objective, DistilledObjective) and not objective.is_own_teacher:
        return "teacher", objective.teacher
    model = plan.recipe.model
    if model.from_dense is None:
        return None
    dense = model.model_copy(update={"from_dense": None})
    return "dense", plan.task.objective(load.load_base(dense, resolve(dense).folder, device))


def shards_of(plan: Plan) -> Shards | None:
    """Return what divides the base as it is read; None where every process holds all of it, at first or always."""
    divides = plan.deepspeed.stage == 3 and not reads_base(plan.recipe.adapter)
    return Shards(plan.deepspeed.values) if divides else None


def _read_checkpoint(
    plan: Plan, folder: RunFolder, processes: Processes, names: list[str], data_digest: str
) -> Resumed | None:
    """Let the first process choose and verify the checkpoint; return its content, or None at a new start."""
    newest = checkpoint.newest(folder.checkpoints) if processes.is_main_process else None
    found = ranks.broadcast(newest, processes.device)
    if found is None and plan.recipe.output.resume == "must":
        raise UserError(f"output.resume is must, and {folder.checkpoints} has no complete checkpoint.")
    if found is None:
        return None
    tensors, trainer = checkpoint.read(found, names)
    if trainer["data_digest"] != data_digest:
        raise UserError(
            f"The training rows differ from those that {found} was trained on: {plan.recipe.data.source} has changed "
            "since. Put the data back, or choose another output.dir."
        )
    return Resumed(found, tensors, trainer)


def _set_weights(model: Any, items: Sequence[Trainable], resumed: Resumed | None, section: AdapterSection) -> None:
    """Set the trained parameters to those of a checkpoint, or of an adapter folder at a new start.

    The factors of even slots are those of the run; at a new start they are measured, and weights are fitted to them.
    """
    adapter = section.weights
    if section.scaling == "even":
        found = None if resumed is None else (saved_config(resumed.folder / "adapter") or {}).get("scales")
        set_scales(model, found or even_scales(model))
    if resumed is not None:
        require_same_frozen(model, resumed.folder / "adapter")
        for item in items:
            set_whole(item.parameter, resumed.tensors[f"master/{item.name}"])
    elif adapter is not None:
        load_start(model, list(items), Path(adapter))


def _rated(items: Sequence[Trainable], bare: Any, recipe: Recipe) -> list[Trainable]:
    """Return the parameters with the rates of the section vlora, and those that Muon steps: matrices of the layers."""
    if not recipe.adapter.is_full:
        return list(items)
    shared, muon = recipe.vlora, set()
    found = {} if shared is None else rates(bare, shared.lr_factors, shared.decay_increments)
    if recipe.training.optimizer == "muon":
        muon = {id(p) for layer in layers(bare) for p in layer.parameters() if len(whole_shape(p)) == 2}
    return [
        replace(
            item,
            lr_factor=item.lr_factor * found.get(id(item.parameter), Rate()).lr_factor,
            decays=found.get(id(item.parameter), Rate()).decays,
            muon=id(item.parameter) in muon,
        )
        for item in items
    ]


def _supernet(plan: Plan, model: nn.Module) -> Supernet:
    """Return the layers whose paths are drawn; none of them where the recipe fixes the paths."""
    recipe = plan.recipe
    drawn, settings = recipe.adapter.supernet or SupernetSection(), recipe.training
    found = searched_layers(model) if recipe.adapter.is_supernet else {}
    micro_batches = settings.global_batch // settings.micro_batch
    return Supernet(found, settings.seed, drawn.sandwich or 0, micro_batches, drawn.odds)
