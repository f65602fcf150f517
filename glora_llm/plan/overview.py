"""Describe a resolved recipe as text: model, adapter, data, batch and merge, before any weight is loaded."""

from typing import Any

from glora_llm.adapters.inject import adapted_layers, inject, without_adapter
from glora_llm.errors import UserError
from glora_llm.launch.device import choose_device
from glora_llm.models import load
from glora_llm.plan.checks import check_float16, check_masters, merge_obstacle
from glora_llm.plan.plan import Plan
from glora_llm.plan.step_memory import without_start
from glora_llm.search.space import space_of
from glora_llm.training import checkpoint
from glora_llm.vlora import allocated


def describe(plan: Plan) -> str:
    """Return what a run would do, as text; builds the model without weights to count and to match targets.

    Raises:
        UserError: when targets match nothing, a slot or the merge asked for is impossible, or the device or the ZeRO
            stage cannot train in this precision.
    """
    recipe = plan.recipe
    dtype = load.compute_dtype(recipe.model, choose_device())
    check_float16(plan.deepspeed, dtype)
    check_masters(recipe, dtype, plan.deepspeed.stage)
    empty = load.meta_model(recipe.model, plan.base.folder)
    model = inject(empty, without_start(recipe.adapter), recipe.training.seed, plan.steps, plan.genome)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    saved = checkpoint.size(trained, has_adapter=not recipe.adapter.is_full)
    if recipe.search is not None:
        measured = recipe.search.limit != "parameters"  # what that costs is not known yet
        space_of(adapted_layers(model), recipe.search, (lambda *_: 0.0) if measured else None)
    obstacle = merge_obstacle(without_adapter(model).config, model)
    if obstacle and recipe.merge.after_training:
        raise UserError(f"merge.after_training: {obstacle}")
    lines = [
        f"model      {plan.base.name}, {recipe.model.quantization}, {(total - trained) / 1e6:.1f} M frozen",
        f"adapter    {recipe.adapter.method}, {trained / 1e6:.3f} M trained ({100 * trained / total:.2f} %)",
        *_describe_sharing(model),
        *[f"data       {report.describe()}" for report in plan.task.reports.values()],
        f"batch      {plan.batch_identity()}; {plan.steps} steps, "
        f"{plan.steps / plan.sampler.steps_per_epoch:.2f} epochs",
        f"deepspeed  {recipe.training.deepspeed}; {2 * saved / 1e6:.0f} MB for two checkpoints",
        f"merge      {obstacle or 'possible into a plain transformers model'}",
    ]
    return "\n".join(lines)


def _describe_sharing(model: Any) -> list[str]:
    count = allocated(model)
    if not count.dense:
        return []
    return [
        f"vlora      {count.total / 1e6:.3f} M of {count.dense / 1e6:.3f} M in the shared linears "
        f"({100 * count.share:.1f} %): bases {count.base / 1e6:.3f} M, increments {count.increments / 1e6:.3f} M"
    ]
