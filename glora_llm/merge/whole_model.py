"""A model that was trained as a whole -> a plain dense Hugging Face folder, shard by shard."""

import contextlib
import copy
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from glora_llm.atomic import whole_folder
from glora_llm.errors import UserError
from glora_llm.evaluation.trained import NOT_ENDED
from glora_llm.merge.folder_writer import FolderWriter
from glora_llm.models.fingerprint import fingerprint
from glora_llm.models.folder import read_sharing, write_trained
from glora_llm.models.load import load_base
from glora_llm.plan.plan import Plan
from glora_llm.vlora import VLoRALinear

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
        write_model(plan, config, load_file(checkpoint / "state.safetensors"), place / "model")
        yield place / "model"
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write_dense(plan: Plan, model: Path, out: Path, dtype: str) -> None:
    """Write the layers of a trained model as plain transformers loads them, composed in float32.

    Args:
        model: a model folder of a run.
        dtype: of the written weights.

    Raises:
        UserError: when `out` exists, the disk is too small, or the folder does not hold the whole model.
    """
    section = plan.recipe.model.model_copy(update={"dtype": "float32", "attention": "auto", "kernels": "none"})
    whole: Any = load_base(section, model, torch.device("cpu"), zero3=False)
    size = sum(p.numel() for p in whole.parameters()) * SIZES[dtype]
    with FolderWriter(out, getattr(torch, dtype), plan.recipe.merge.max_shard_gb, size) as writer:
        for name, tensor in dense_tensors(whole):
            writer.add(name, tensor)
        config = copy.deepcopy(whole.config)
        config.dtype, config.use_cache = getattr(torch, dtype), True
        config.architectures = [type(whole).__name__]
        config.save_pretrained(writer.folder)
        plan.task.save_preprocessing(writer.folder)


@torch.no_grad()
def dense_tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the dense model that a VLoRA model computes, one composed weight at a time."""
    for name, module in model.named_modules():
        if isinstance(module, VLoRALinear):
            yield f"{name}.weight", module.weight.detach()
    for name, parameter in model.named_parameters():  # a tied weight is listed once
        if not name.endswith((".increment_a", ".increment_b")):
            yield name, parameter.detach()


def write_model(plan: Plan, config: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write a model folder from float32 master weights (`master/NAME` -> tensor), all or nothing."""
    weights = {name.removeprefix("master/"): t for name, t in tensors.items() if name.startswith("master/")}
    with whole_folder(folder) as place:
        write_trained(place, config, read_sharing(plan.base.folder), weights)
        plan.task.save_preprocessing(place)
