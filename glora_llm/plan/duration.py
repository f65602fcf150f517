"""The time that training takes at least: its floating-point operations over the peak rate of the devices."""

from dataclasses import dataclass
from typing import Any

import torch

from glora_llm.plan.plan import Plan
from glora_llm.schema import Recipe
from glora_llm.training.flops import bf16_peak, count_cost, peak_flops
from glora_llm.training.image_objective import patches_of

# A share of the peak that a step might reach: an assumption, for no run on a GPU was measured here. Of large
# models that are trained in full, 21 to 46 % were reported (PaLM, arXiv 2204.02311, table 3).
ASSUMED_SHARE = 0.3
SAMPLED = 512  # training rows whose label tokens are counted


@dataclass(frozen=True)
class Duration:
    """The time of training, without loading, evaluation, search and merge.

    Args:
        steps: optimizer steps; None: they follow from data that were not read.
        step_flops: floating-point operations of one step of all processes.
        tokens: of one step.
        peak_flops: of one device, FLOP/s; None: not known.
        source: of the peak.
        share: of the peak that `seconds` assumes.
        least_seconds: at the whole peak.
        seconds: at the assumed share.
    """

    steps: int | None
    step_flops: float
    tokens: float
    peak_flops: float | None
    source: str
    share: float
    least_seconds: float | None
    seconds: float | None


def duration(
    model: Any, recipe: Recipe, plan: Plan | None, world_size: int, name: str | None, on_cpu: bool, dtype: torch.dtype
) -> Duration:
    """Return the time that a recipe's training takes on devices of a name, or on this CPU.

    Args:
        model: with its adapter, without weights.
    """
    peak, source = _peak(name, on_cpu, dtype)
    causal = recipe.data.format != "images"
    cost = count_cost(model, model.config, peak or 1.0, causal)
    tokens, targets, width = _extent(recipe, plan, model.config)
    flops = cost.step_flops(round(tokens), round(targets), round(width))
    steps = plan.steps if plan else recipe.training.steps
    least = steps * flops / (peak * world_size) if peak and steps else None
    share = ASSUMED_SHARE
    return Duration(steps, flops, tokens, peak, source, share, least, None if least is None else least / share)


def _peak(name: str | None, on_cpu: bool, dtype: torch.dtype) -> tuple[float | None, str]:
    if on_cpu:
        return peak_flops(dtype, torch.device("cpu")), "a product of two 1,024 x 1,024 matrices, measured now"
    if name is None:
        return None, "no GPU was named: --gpu NAME"
    if dtype != torch.bfloat16:
        return None, f"peaks are known in bfloat16 alone, and this recipe computes in {dtype}".replace("torch.", "")
    peak = bf16_peak(name)
    return peak, "the vendor's data sheet, dense bfloat16" if peak else f"no peak of a '{name}' is known"


def _extent(recipe: Recipe, plan: Plan | None, config: Any) -> tuple[float, float, float]:
    """Return tokens and label tokens of a step, and the width of attention."""
    batch = recipe.training.global_batch
    if recipe.data.format == "images":
        size = plan.task.train.size if plan else config.image_size  # type: ignore[attr-defined]
        patches = patches_of(config, size)
        return batch * patches, batch, patches
    if plan is None:
        return batch * recipe.data.max_tokens, batch * recipe.data.max_tokens, recipe.data.max_tokens
    rows: Any = plan.task.train
    width = float(rows.lengths().mean())
    some = plan.choice(rows, min(SAMPLED, len(rows)))
    targets = sum(plan.task.targets(rows, row) for row in some) / len(some)
    return batch * width, batch * targets, width
