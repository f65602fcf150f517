"""A text model with a head for classes or a number: a copy of it in the cache, with a new, seeded head."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from glora_llm.atomic import cache_root, make_once
from glora_llm.errors import UserError
from glora_llm.models.classifier import with_new_head
from glora_llm.models.config_file import load_config
from glora_llm.models.families import built_as, head_names
from glora_llm.models.fingerprint import fingerprint
from glora_llm.models.folder import is_ours
from glora_llm.models.resolve import ResolvedModel


def with_text_head(
    base: ResolvedModel, names: list[str] | None, pad: int, seed: int, weights: bool = True
) -> ResolvedModel:
    """Return a sequence classifier: the model itself where it has just these classes, else a copy with a new head.

    Args:
        base: a folder of a causal language model, an encoder, or a sequence classifier.
        names: of the classes; None: a regression, a head of one output.
        pad: token id of what fills up rows: transformers finds the last token of a sample by it.
        seed: of the new head.
        weights: False for a dry run: only the configuration is copied.

    Raises:
        UserError: for a model whose layers share weights.
    """
    if is_ours(base.folder):
        raise UserError(
            f"'{base.name}' is a VLoRA folder, which transformers' sequence classifiers do not load: merge it into a "
            "dense model first, or learn label words: task=language_modeling."
        )
    config = load_config(base.folder)
    if built_as(config) == "classification" and _classes(config) == names and config.pad_token_id == pad:
        return base
    told = json.dumps([names, pad, seed])
    identity = (
        f"{base.fingerprint[:16] or base.name.replace('/', '-')}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    )
    place = cache_root() / ("heads" if weights else "heads-without-weights") / identity
    folder = make_once(place, lambda made: _write(base.folder, made, names, pad, seed, weights))
    found = fingerprint(folder) if weights else ""
    return replace(base, folder=folder, fingerprint=found, headless=base.headless or base.fingerprint)


def _classes(config: Any) -> list[str] | None:
    return None if config.num_labels == 1 else list(config.id2label.values())


def _write(source: Path, folder: Path, names: list[str] | None, pad: int, seed: int, weights: bool) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForSequenceClassification

    classes = names or ["number"]
    settings = {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
        "problem_type": "regression" if names is None else "single_label_classification",
    }
    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False, **settings)
    config.pad_token_id = config.get_text_config().pad_token_id = pad
    with torch.device("meta"):
        shape = AutoModelForSequenceClassification.from_config(config)
    config.architectures = [type(shape).__name__]
    config.save_pretrained(folder)
    if not weights:
        return
    model = with_new_head(AutoModelForSequenceClassification, source, config)
    _start_head(model, config, seed)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _start_head(model: Any, config: Any, seed: int) -> None:
    """Set the weights of the head: matrices normal, with the family's own standard deviation, the rest zero."""
    import torch

    random = torch.Generator().manual_seed(seed)
    std = getattr(config.get_text_config(), "initializer_range", 0.02)
    with torch.no_grad():
        for name in head_names(model):
            for parameter in model.get_submodule(name).parameters():
                start = torch.zeros(parameter.shape)
                parameter.copy_(start.normal_(0.0, std, generator=random) if parameter.dim() > 1 else start)
