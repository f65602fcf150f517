"""A model that was trained as a whole -> a plain dense Hugging Face folder, shard by shard."""

import contextlib
import copy
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig

from glora_llm.atomic import whole_folder
from glora_llm.errors import UserError
from glora_llm.evaluation.trained import NOT_ENDED
from glora_llm.merge.folder_writer import folder_writer
from glora_llm.models.fingerprint import fingerprint
from glora_llm.models.folder import WEIGHTS, read_sharing, write_trained, write_trained_config
from glora_llm.models.load import meta_model
from glora_llm.models.stored import copy_tensors, is_increment, stored_tensors
from glora_llm.plan.plan import Plan
from glora_llm.vlora import compositions


@contextlib.contextmanager
def trained_model(plan: Plan, model: Path, checkpoint: Path | None) -> Iterator[Path]:
    """Give the model folder to merge: the run's own, or one that is made of a checkpoint and removed again.

    Args:
        model: RUN/model.
        checkpoint: a whole checkpoint of the run; None: the end of the run.

    Raises:
        UserError: when the run has not ended, or its model is damaged.
    """
    if checkpoint is None:
        if not (model / "config.json").is_file():
            raise UserError(f"{model} {NOT_ENDED}")
        fingerprint(model)  # reads the table of the weights: a file that was cut off is refused
        yield model
        return
    place = Path(tempfile.mkdtemp(prefix=".merge-", dir=model.parent))
    try:
        config = AutoConfig.from_pretrained(plan.base.folder, local_files_only=True)
        write_trained_config(place, config, read_sharing(plan.base.folder), torch.float32)
        copy_tensors(checkpoint / "state.safetensors", place / WEIGHTS, "master/")
        plan.task.save_preprocessing(place)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


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
        for name in tqdm(names, desc="merge", disable=None, unit="tensor"):
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
        plan.task.save_preprocessing(place)
