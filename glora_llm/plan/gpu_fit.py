"""Refuse a launch whose computed memory exceeds that of its GPUs, and name settings that fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from glora_llm.errors import UserError
from glora_llm.launch.device import choose_device
from glora_llm.models.load import compute_dtype
from glora_llm.plan.memory import GB, Memory, at_rest, model_sizes, not_computable, step_bytes
from glora_llm.schema import Recipe
from glora_llm.training.deepspeed_config import read_deepspeed_config, zero_stage

WORLDS = (1, 2, 4, 8)  # that a dry run on a machine without GPU computes for
NOTHING = "no micro_batch, checkpointing, quantization or ZeRO stage; use more GPUs, or larger ones"
# A family may read values or count its layers, and a recipe may adapt layers that the few measured ones are not among:
# then nothing is computed, and the launch goes on.
NO_TRACE = (AttributeError, KeyError, RuntimeError, TypeError, UserError, ValueError)
Changes = dict[str, dict[str, Any]]  # section -> key -> value


def describe_memory(recipe: Recipe, folder: Path, world_size: int) -> str:
    """Return the memory of one GPU in words, after comparing it with the GPUs of this machine.

    Without a GPU here it is that of GPUs that compute in bfloat16, for several numbers of them.

    Args:
        folder: of the base model.
        world_size: processes of this launch.

    Raises:
        UserError: when a GPU of this machine has less memory than one process needs.
    """
    reason = not_computable(recipe)
    if reason:
        return reason
    dtype = gpu_dtype(recipe)
    sizes = model_sizes(recipe, folder, dtype)
    try:
        step = step_bytes(recipe, folder, dtype)
    except NO_TRACE as error:
        why = " ".join(str(error).split())[:120]
        return f"not computed: a step of this model cannot be followed without values ({why})"
    memory = at_rest(recipe, sizes, world_size, dtype, step)
    if choose_device().type == "cuda":
        require_memory(recipe, folder, world_size, memory)
        several = f"{memory.peak / GB:.1f} GB a GPU"
    else:
        unit = recipe.training.micro_batch
        worlds = [count for count in WORLDS if recipe.training.global_batch % (unit * count) == 0]
        peaks = {count: at_rest(recipe, sizes, count, dtype, step).peak / GB for count in worlds}
        several = "; ".join(f"{peak:.1f} GB a GPU on {count}" for count, peak in peaks.items())
    return f"{several} (computed, not measured); GB in training on {world_size}: {memory.parts()}"


def require_memory(recipe: Recipe, folder: Path, world_size: int, memory: Memory) -> None:
    """Check that every GPU of this machine has the memory that one process needs.

    Raises:
        UserError: naming settings that fit.
    """
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    smallest = min(gpus, key=lambda gpu: gpu.total_memory)
    if memory.peak <= smallest.total_memory:
        return
    enough = [
        f"{in_words(changes)} ({peak / GB:.1f} GB)"
        for changes, peak in fitting(
            recipe, world_size, lambda changed: _peak_within(changed, folder, world_size, smallest.total_memory)
        )
    ]
    raise UserError(
        f"One process of this run needs {memory.peak / GB:.1f} GB (computed; {memory.parts()}; "
        f"{memory.loading / GB:.1f} while loading), and {smallest.name} has {smallest.total_memory / GB:.1f} GB. "
        f"What fits: {'; '.join(enough) or NOTHING}."
    )


def gpu_dtype(recipe: Recipe) -> torch.dtype:
    """Return what the model computes in on a GPU; without one here, on a GPU that has bfloat16."""
    device = choose_device()
    if device.type == "cuda":
        return compute_dtype(recipe.model, device)
    named = recipe.model.dtype
    return torch.bfloat16 if named == "auto" else getattr(torch, named)


def fitting(
    recipe: Recipe, world_size: int, peak_within: Callable[[Recipe], int | None], scoring: bool = False
) -> list[tuple[Changes, int]]:
    """Return changes of settings under which one process fits, with the bytes that it needs then.

    First each setting alone; several together only where none alone is enough.

    Args:
        peak_within: changed recipe -> its bytes where it fits, else None.
        scoring: evaluation counts too, so its batch is lowered with the micro batch.
    """
    found = []
    for kinds in (_single_changes(recipe, world_size), _combined_changes(recipe, world_size)):
        for alternatives in kinds:
            for plain in alternatives:  # from the mildest: the first that fits is enough
                changes = _scored_alike(recipe, plain) if scoring else plain
                peak = peak_within(_changed(recipe, changes))
                if peak:
                    found.append((changes, peak))
                    break
        if found:
            return found
    return found


def _peak_within(recipe: Recipe, folder: Path, world_size: int, available: int) -> int | None:
    """Return the peak of a recipe if it fits; a step is looked at only where the rest does."""
    dtype = gpu_dtype(recipe)
    sizes = model_sizes(recipe, folder, dtype)
    if at_rest(recipe, sizes, world_size, dtype, step=0).peak > available:
        return None
    peak = at_rest(recipe, sizes, world_size, dtype, step_bytes(recipe, folder, dtype)).peak
    return peak if peak <= available else None


def _single_changes(recipe: Recipe, world_size: int) -> list[list[Changes]]:
    model, training = recipe.model, recipe.training
    kinds: list[list[Changes]] = [[{"training": {"micro_batch": count}} for count in _smaller(recipe, world_size)]]
    if not model.gradient_checkpointing:
        kinds.append([{"model": {"gradient_checkpointing": True}}])
    ranks = _smaller_ranks(recipe)
    if ranks:
        kinds.append(ranks)
    if world_size > 1 and model.quantization != "int8" and zero_stage(read_deepspeed_config(training.deepspeed)) < 3:
        kinds.append([{"training": {"deepspeed": "zero3"}}])
    if model.quantization == "none" and not recipe.adapter.is_full:
        kinds.append([{"model": {"quantization": "nf4"}}])
    return kinds


def _combined_changes(recipe: Recipe, world_size: int) -> list[list[Changes]]:
    """Checkpointing and a smaller batch; then the same with what makes the weights smaller."""
    batches: list[Changes] = [{}, *({"training": {"micro_batch": count}} for count in _smaller(recipe, world_size))]
    smallest = [_joined({"model": {"gradient_checkpointing": True}}, batch) for batch in batches]
    fewer_weights = [kind[0] for kind in _single_changes(recipe, world_size) if kind and _divides_weights(kind[0])]
    return [smallest, *[[_joined(change, batch) for batch in smallest] for change in fewer_weights]]


def _scored_alike(recipe: Recipe, changes: Changes) -> Changes:
    """Score no more samples at once than a changed micro batch has."""
    micro = changes.get("training", {}).get("micro_batch", recipe.evaluation.batch)
    return changes if micro >= recipe.evaluation.batch else _joined(changes, {"evaluation": {"batch": micro}})


def _divides_weights(changes: Changes) -> bool:
    return "deepspeed" in changes.get("training", {}) or "quantization" in changes.get("model", {})


def _smaller(recipe: Recipe, world_size: int) -> list[int]:
    """Return smaller micro batches that divide the global batch, the largest first."""
    training = recipe.training
    halves = [training.micro_batch // 2**power for power in range(1, training.micro_batch.bit_length())]
    return [count for count in halves if training.global_batch % (count * world_size) == 0]


def _smaller_ranks(recipe: Recipe) -> list[Changes]:
    """Return halves of adapter.rank; a supernet has ranks of its own."""
    adapter = recipe.adapter
    if adapter.is_full or adapter.is_supernet or adapter.genome is not None or adapter.budget is not None:
        return []
    return [{"adapter": {"rank": adapter.rank // 2**power}} for power in range(1, adapter.rank.bit_length())]


def _joined(*parts: Changes) -> Changes:
    joined: Changes = {}
    for part in parts:
        for section, values in part.items():
            joined[section] = {**joined.get(section, {}), **values}
    return joined


def _changed(recipe: Recipe, changes: Changes) -> Recipe:
    sections = {name: getattr(recipe, name).model_copy(update=values) for name, values in changes.items()}
    return recipe.model_copy(update=sections)


def in_words(changes: Changes) -> str:
    """Return changes as they are written on a command line."""
    named = ((f"{section}.{key}", value) for section, values in changes.items() for key, value in values.items())
    return " ".join(f"{name}={str(value).lower()}" for name, value in named)
