"""The checkpoint that a launch goes on from, and what differs between the launch that wrote it and this one."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from glora_llm.schema import Recipe


class Resumed(NamedTuple):
    """The content of a checkpoint."""

    folder: Path
    tensors: dict[str, Tensor]
    trainer: dict[str, Any]


def layout(recipe: Recipe, stage: int, world_size: int) -> dict[str, Any]:
    """Return how a launch divides its work; a checkpoint holds it for the next one to compare."""
    return {"processes": world_size, "ZeRO stage": stage, "micro batch": recipe.training.micro_batch}


def describe_changes(before: dict[str, Any], now: dict[str, Any], recipe: Recipe) -> list[str]:
    """Return what a launch that divides its work otherwise keeps, and what it cannot keep, a line each.

    Args:
        before: `layout` of the launch that wrote the checkpoint; empty where an older version wrote it.
        now: that of this launch.
    """
    changed = {key: (before[key], value) for key, value in now.items() if before.get(key, value) != value}
    if not changed:
        return []
    what = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changed.items())
    lines = [
        f"going on with {what}: the samples of each step, weights and moments stay the same; sums are taken in "
        "another order, so numbers may differ in their last digits"
    ]
    drawn = [name for name, is_drawn in _drawn_by_micro_batch(recipe).items() if is_drawn]
    if "micro batch" in changed and drawn:
        lines.append(f"not kept: {' and '.join(drawn)}, drawn anew for each micro batch")
    if recipe.training.optimizer.endswith("8bit"):
        lines.append("not kept: 8-bit moments are quantised anew, in other blocks of 256")
    return lines


def _drawn_by_micro_batch(recipe: Recipe) -> dict[str, bool]:
    adapter = recipe.adapter
    dropout = adapter.dropout > 0 or any("dropout" in key for key in adapter.peft or {})
    return {"the paths of the supernet": adapter.is_supernet, "dropout": dropout}
