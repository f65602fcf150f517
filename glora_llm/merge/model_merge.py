"""base files + adapter -> a plain Hugging Face folder, computed in float32 from the weights that were trained."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glora_llm.adapters.methods import unmerged
from glora_llm.errors import UserError
from glora_llm.evaluation.progress import progress
from glora_llm.merge.folder_writer import FolderWriter, folder_writer
from glora_llm.merge.layers import AdapterLayers
from glora_llm.models.bias import bias_switch, suffixes_with_bias
from glora_llm.models.matrices import matrix_shape
from glora_llm.models.stored import StoredTensors, stored_tensors
from glora_llm.plan.mergeable import merge_obstacle
from glora_llm.plan.plan import Plan


def mergeable_layers(plan: Plan, adapter: Path) -> AdapterLayers:
    """Return the layers of a trained adapter that can be merged into its model.

    Args:
        adapter: folder that PEFT saved.

    Raises:
        UserError: when the adapter does not fit the recipe, or cannot be merged.
    """
    if obstacle := unmerged(plan.recipe.adapter):
        raise UserError(obstacle)
    layers = AdapterLayers(plan.recipe, plan.base.folder, adapter, plan.steps)
    if obstacle := merge_obstacle(layers.model.get_base_model().config, layers.model):
        raise UserError(obstacle)
    return layers


def write_merged(plan: Plan, adapter: Path, out: Path, base_dtype: torch.dtype, dtype: str) -> None:
    """Merge an adapter into its base and write the model as plain transformers loads it.

    Args:
        adapter: folder that PEFT saved.
        out: folder to make.
        base_dtype: what the frozen weights were computed in when the adapter was trained.
        dtype: of the written weights.

    Raises:
        UserError: when `out` exists, the disk is too small, or the adapter does not fit or cannot be merged.
    """
    layers = mergeable_layers(plan, adapter)
    config = layers.model.get_base_model().config
    stored = stored_tensors(plan.base.folder, plan.recipe.model, base_dtype)
    require_stored_layers(layers, stored)
    size = stored.numbers() * getattr(torch, dtype).itemsize
    with folder_writer(out, getattr(torch, dtype), plan.recipe.merge.max_shard_gb, size) as writer:
        biased: set[str] = set()
        for name in progress(stored.names(), "merge", "tensor"):
            for written, value in merged_tensors(name, stored, layers, base_dtype):
                writer.add(written, value)
                if written.endswith(".bias"):
                    biased.add(written.removesuffix(".bias"))
        zero_biases(config, layers, layers.decoder, biased, writer)
        add_untied_head(config, layers, stored, writer)
        write_settings(plan, config, writer.folder, dtype)


def require_stored_layers(layers: AdapterLayers, stored: StoredTensors) -> None:
    """Check that the base's files name the weight of every adapted layer as the model's modules do.

    Raises:
        UserError: naming the first that they do not.
    """
    absent = [name for name in layers.stored_names() if f"{name}.weight" not in stored]
    if absent:
        raise UserError(
            f"The files of the base hold no {absent[0]}.weight, which is adapted: they name tensors in another way "
            "than the modules of transformers do, or it is shared with another layer. Load the base by transformers, "
            "save it (save_pretrained) and train on that folder; or leave a layer that is tied to another out of the "
            "targets."
        )


def merged_tensors(
    name: str, stored: StoredTensors, layers: AdapterLayers, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield what the merged model stores for one tensor of the base (a weight may bring a bias along)."""
    owner, _, kind = name.rpartition(".")
    replaced = layers.replaced(name)
    if replaced is not None:  # modules_to_save
        yield name, replaced
    elif owner in layers.layers or owner in layers.parts:
        if kind != "weight":
            return  # the bias is written with its weight
        b0 = stored.get(f"{owner}.bias").to(dtype) if f"{owner}.bias" in stored else None
        weight, bias = layers.merged(owner, layers.trained_weight(owner, stored, dtype), b0)
        yield name, layers.in_layout(owner, weight)
        if bias is not None:
            yield f"{owner}.bias", bias
    elif owner in layers.decoder and kind == "weight":
        yield name, layers.in_layout(owner, layers.trained_weight(owner, stored, dtype))
    else:
        yield name, stored.get(name)


def zero_biases(config: Any, layers: AdapterLayers, linears: set[str], biased: set[str], writer: FolderWriter) -> None:
    """Turn on the config's bias switches that the merged layers need, with zeros where a layer has no bias."""
    for suffix in sorted({name.rpartition(".")[2] for name in biased & linears}):
        switch = bias_switch(config, suffix)
        if switch is not None:
            setattr(config, switch, True)
    expected = suffixes_with_bias(config)
    for name in sorted(linears - biased):
        if name.rpartition(".")[2] in expected:
            writer.add(f"{name}.bias", torch.zeros(matrix_shape(layers.originals[name])[0]))


def add_untied_head(config: Any, layers: AdapterLayers, stored: StoredTensors, writer: FolderWriter) -> None:
    """Write the output head where it was the embedding, and one of both was trained: no longer the same."""
    if "lm_head.weight" in stored:
        return
    head, embedding = layers.replaced("lm_head.weight"), layers.embedding()
    changed = embedding in layers.layers or layers.replaced(f"{embedding}.weight") is not None
    if head is None and changed and hasattr(layers.model.get_base_model(), "lm_head"):
        head = stored.get(f"{embedding}.weight")  # the unmerged head stays the frozen embedding
    if head is not None:
        config.tie_word_embeddings = False
        writer.add("lm_head.weight", head)


def write_settings(plan: Plan, config: Any, folder: Path, dtype: str) -> None:
    """Write config.json, and what goes with the base: its tokenizer and how it generates."""
    config.dtype = getattr(torch, dtype)
    config.use_cache = True
    config.save_pretrained(folder)
    plan.task.save_preprocessing(folder)
    generation = plan.base.folder / "generation_config.json"
    if generation.is_file():
        shutil.copy(generation, folder)
