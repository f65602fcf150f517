"""A model that was trained as a whole -> a plain dense Hugging Face folder, shard by shard."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glora_llm.atomic import whole_folder
from glora_llm.errors import UserError
from glora_llm.evaluation.progress import progress
from glora_llm.failpoints import reach
from glora_llm.merge.folder_writer import folder_writer
from glora_llm.models.folder import read_sharing, write_trained
from glora_llm.models.load import meta_model
from glora_llm.models.stored import is_increment, stored_tensors
from glora_llm.plan.plan import Plan
from glora_llm.vlora import compositions


def write_dense(plan: Plan, model: Path, out: Path, dtype: str) -> None:
    """Write the layers of a trained model as plain transformers loads them, composed in float32 one tensor at a time.

    Args:
        model: a model folder of a run.
        dtype: of the written weights.

    Raises:
        UserError: when `out` exists, the disk is too small, or the folder does not hold the whole model.
    """
    section = plan.recipe.model
    empty = meta_model(section, model)
    stored = stored_tensors(model, section, torch.float32)
    names = [*compositions(empty), *(name for name, _ in empty.named_parameters() if not is_increment(name))]
    absent = [name for name in names if name not in stored]  # a tied weight is named, and stored, once
    if absent:
        raise UserError(
            f"{model} lacks {absent[0]}: it does not hold the whole model. Train on, or merge a checkpoint."
        )
    size = stored.numbers() * getattr(torch, dtype).itemsize
    with folder_writer(out, getattr(torch, dtype), plan.recipe.merge.max_shard_gb, size) as writer:
        for name in progress(names, "merge", "tensor"):
            writer.add(name, stored.get(name).float())
        config = copy.deepcopy(empty.config)
        config.dtype, config.use_cache = getattr(torch, dtype), True
        config.architectures = [type(empty).__name__]
        config.save_pretrained(writer.folder)
        plan.task.save_preprocessing(writer.folder)


def write_model(plan: Plan, config: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write a model folder from float32 master weights (`master/NAME` -> tensor), all or nothing."""
    weights = {name.removeprefix("master/"): t for name, t in tensors.items() if name.startswith("master/")}
    with whole_folder(folder) as place:
        write_trained(place, config, read_sharing(plan.base.folder), weights)
        reach("model.after_weights")
        plan.task.save_preprocessing(place)
