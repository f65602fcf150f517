"""Describe a resolved recipe as text: model, adapter, data, batch and merge, before any weight is loaded."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glora_llm.adapters.even import require_even
from glora_llm.adapters.fusion_sources import check_sources
from glora_llm.adapters.inject import inject, searched_layers, tuner_layers, without_adapter
from glora_llm.adapters.methods import unmerged
from glora_llm.adapters.prompt_arguments import PREFIXES
from glora_llm.adapters.prompts import check_prefix
from glora_llm.adapters.start import require_same_base
from glora_llm.adapters.weights import check_weights, trainables
from glora_llm.errors import Problems, UserError
from glora_llm.glora.path import Genome
from glora_llm.launch.device import choose_device
from glora_llm.models import load
from glora_llm.models.fingerprint import stored_bytes
from glora_llm.models.folder import is_ours
from glora_llm.models.resolve import SAME_NAMES, ResolvedModel, resolve
from glora_llm.models.stored import require_stored
from glora_llm.plan.checks import check_float16, check_masters, check_ranks
from glora_llm.plan.lossless import find_losses, refuse_losses
from glora_llm.plan.mergeable import merge_obstacle
from glora_llm.plan.plan import Plan, make_plan
from glora_llm.plan.prompt_checks import check_room
from glora_llm.plan.step_memory import without_start
from glora_llm.schema import Recipe
from glora_llm.search.space import space_of
from glora_llm.training import checkpoint
from glora_llm.vlora import allocated

MANY_EPOCHS = 10  # of an adapter over the same samples


@dataclass(frozen=True)
class EmptyModel:
    """A model with its adapter and without weights.

    Args:
        model: what `adapters.inject` returned.
        compute: dtype, attention and kernels in words.
        obstacle: why the adapter cannot be merged; None where it can.
    """

    model: Any
    compute: str
    obstacle: str | None


def plan_run(recipe: Recipe, weights: bool, world_size: int) -> tuple[Plan, str]:
    """Resolve a recipe for a launch and describe it.

    Args:
        weights: False leaves the weights of a hub model where they are.
        world_size: processes of the launch.

    Raises:
        UserError: with all that is wrong, of the data as well as of the model.
    """
    found = Problems()
    with found.collected():
        plan = make_plan(recipe, weights, world_size)
    if found.messages:
        with found.collected():
            _check_model(recipe)
    found.raise_all()
    warmup = recipe.training.warmup
    if warmup >= 1 and warmup > plan.steps:
        raise UserError(
            f"training.warmup is {warmup:.0f} steps, and the run has {plan.steps}: it would never reach training.lr. "
            "Give fewer, or a share of the steps (0.03)."
        )
    return plan, describe(plan)


def describe_samples(plan: Plan) -> str:
    """Return some training samples as text, each with its label tokens marked."""
    return "\n".join(f"sample {number}   {text}" for number, text in enumerate(plan.task.previews, 1))


def describe(plan: Plan) -> str:
    """Return what a run would do, as text; builds the model without weights to count and to match targets.

    Raises:
        UserError: with everything of `build_empty` and of the ZeRO stage that is impossible.
    """
    recipe, found = plan.recipe, Problems()
    dtype = load.compute_dtype(recipe.model, choose_device())
    with found.collected():
        check_float16(plan.deepspeed, dtype)
    with found.collected():
        check_masters(recipe, dtype, plan.deepspeed.stage)
    with found.collected():
        empty = build_empty(recipe, plan.base, plan.steps, plan.genome)
    found.raise_all()
    model = empty.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    saved, count = checkpoint.size(trained, has_adapter=not recipe.adapter.is_full), recipe.output.keep + 1
    lines = [
        f"model      {plan.base.name}, {recipe.model.quantization}, {(total - trained) / 1e6:.1f} M frozen",
        f"weights    {_describe_weights(plan)}",
        f"compute    {empty.compute}",
        f"adapter    {recipe.adapter.method}, {trained / 1e6:.3f} M trained ({100 * trained / total:.2f} %)",
        *_describe_structure(plan),
        *_describe_layers(model),
        *_describe_sharing(model),
        *[f"data       {report.describe()}" for report in plan.task.reports.values()],
        f"batch      {plan.batch_identity()}; {plan.steps} steps, {_epochs(plan):.2f} epochs",
        *([f"rate       {plan.rate.lr:g} for training.lr auto: {plan.rate.reason}"] if plan.rate else []),
        f"deepspeed  {recipe.training.deepspeed}; {count * saved / 1e6:.0f} MB for {count} checkpoints (output.keep "
        "and one more)",
        f"merge      {empty.obstacle or 'possible into a plain transformers model'}",
        *[f"warning    {text}" for text in _warnings(plan, without_adapter(model).config)],
    ]
    return "\n".join(lines)


def build_empty(recipe: Recipe, base: ResolvedModel, steps: int, genome: Genome | None) -> EmptyModel:
    """Return the model with its adapter and without weights, after checking what can be checked on it.

    Raises:
        UserError: when targets match nothing, a slot, an attention backend, a kernel or the merge asked for is
            impossible.
    """
    found = Problems()
    with found.collected():
        compute = load.describe_kernels(recipe.model, base.folder, choose_device())
    with found.collected():
        bare = load.meta_model(recipe.model, base.folder)
        if base.fingerprint and bare.config.model_type in SAME_NAMES and not is_ours(base.folder):
            require_stored(bare, base.folder)
        check_ranks(recipe, bare, genome)
        check_room(recipe, bare.config)
        names = set(load.linear_names(bare))
        check_sources(recipe.adapter, base.headless or base.fingerprint)
        model = inject(bare, without_start(recipe.adapter), recipe.training.seed, steps, genome)
        if recipe.adapter.scaling == "even":
            require_even(model)
        if recipe.adapter.method in PREFIXES:
            check_prefix(model)
        if recipe.adapter.weights is not None:
            check_weights(model, trainables(model, recipe.adapter, 1.0), Path(recipe.adapter.weights))
            require_same_base(Path(recipe.adapter.weights), base.fingerprint)
        if recipe.search is not None and recipe.adapter.is_supernet:
            measured = recipe.search.limit != "parameters"  # what that costs is not known yet
            space_of(searched_layers(model), recipe.search, (lambda *_: 0.0) if measured else None)
        obstacle = unmerged(recipe.adapter) or merge_obstacle(without_adapter(model).config, model)
        if obstacle and recipe.merge.after_training:
            raise UserError(f"merge.after_training: {obstacle}")
        if recipe.merge.quantize == "nf4_lossless" and not recipe.adapter.is_supernet:
            losses = find_losses(recipe, {name: layer for name, layer in tuner_layers(model).items() if name in names})
            if losses:
                raise UserError(refuse_losses(losses))
    found.raise_all()
    return EmptyModel(model, compute, obstacle)


def _check_model(recipe: Recipe) -> None:
    """Check model and adapter of a recipe whose data are wrong; a new model would need the data."""
    if recipe.model.config is None:
        base = resolve(recipe.model, weights=False, kind="classification" if recipe.head else None)
        build_empty(recipe, base, recipe.training.steps or 1, None)


HUB = "fetched from the hub when training starts"


def _describe_weights(plan: Plan) -> str:
    if plan.recipe.model.config is not None:
        return "random, drawn by the seed"
    if plan.recipe.model.from_dense is not None:
        return f"made of {plan.base.name} when training starts, once"
    if not plan.base.fingerprint:  # nothing was looked at
        return "a copy with a new head, made when training starts" if plan.recipe.head else HUB
    return f"{stored_bytes(plan.base.folder) / 1e6:,.1f} MB in safetensors files, whole"


def _describe_layers(model: Any) -> list[str]:
    """Return how many layers of each kind are adapted; nothing where the whole model is trained."""
    names = tuner_layers(model)
    if not names:
        return []
    kinds = Counter(name.rpartition(".")[2] for name in names)
    return [f"layers     {len(names)} adapted: {', '.join(f'{kind} {count}' for kind, count in sorted(kinds.items()))}"]


def _describe_structure(plan: Plan) -> list[str]:
    """Return what chooses the slots of a budget, where that is still to come."""
    adapter = plan.recipe.adapter
    if adapter.budget is None or plan.genome is not None:
        return []
    how = "evenly" if adapter.predictor == "uniform" else f"by {adapter.predictor} when training starts"
    shown = "" if adapter.predictor == "uniform" else "; counted here as it is spent evenly"
    return [f"structure  within {adapter.budget}, {how}{shown}"]


def _epochs(plan: Plan) -> float:
    return plan.steps / plan.sampler.steps_per_epoch


def _warnings(plan: Plan, config: Any) -> list[str]:
    """Return what is possible and seldom meant."""
    recipe, warnings = plan.recipe, []
    is_text = recipe.data.format != "images"  # images are varied, and a hundred epochs of few are usual
    if _epochs(plan) > MANY_EPOCHS and is_text and not recipe.adapter.is_full:
        warnings.append(
            f"{plan.steps} steps go over the {len(plan.task.train):,} training samples {_epochs(plan):.0f} times; an "
            "adapter often learns them by heart after a few. Lower training.steps, or give training.epochs."
        )
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if plan.task.causal and context and recipe.data.max_tokens > context:
        warnings.append(
            f"data.max_tokens is {recipe.data.max_tokens:,}, and the model was made for {context:,} tokens. Lower "
            "data.max_tokens."
        )
    return warnings


def _describe_sharing(model: Any) -> list[str]:
    count = allocated(model)
    if not count.dense:
        return []
    gains = f", gains {count.gains / 1e6:.3f} M" if count.gains else ""
    return [
        f"vlora      {count.total / 1e6:.3f} M of {count.dense / 1e6:.3f} M in the shared linears "
        f"({100 * count.share:.1f} %): bases {count.base / 1e6:.3f} M, increments {count.increments / 1e6:.3f} M{gains}"
    ]
