"""An image classifier that fits the data: what they say about a new one, or a model that is there with a new head."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from glora_llm.atomic import cache_root, make_once
from glora_llm.errors import UserError
from glora_llm.models.fingerprint import fingerprint, weight_files
from glora_llm.models.folder import SHARING, is_ours
from glora_llm.models.resolve import ResolvedModel

HEAD = "classifier"
STD = 0.02  # of a new head, where a family names none


def from_data(config: Mapping[str, Any], names: list[str], size: int) -> dict[str, Any]:
    """Return what the data say about a new classifier: classes, their names, and the size of the images.

    Args:
        config: the recipe's model.config.
        names: of the classes.
        size: of the images, in pixels.

    Raises:
        UserError: when the recipe says another number of classes or another size.
    """
    for key, there in (("num_labels", len(names)), ("image_size", size), ("num_channels", 3)):
        if config.get(key, there) != there:
            what = {"num_labels": f"{there} classes", "image_size": f"images of {there} x {there} pixels"}
            raise UserError(
                f"model.config.{key} is {config[key]}, and the data have {what.get(key, '3 channels')}: leave the key "
                "out, it comes from the data."
            )
    return {"image_size": size, "num_channels": 3, **_named(names)}


def check_patches(patch: Any, size: int) -> None:
    """Check that patches of this side divide an image.

    Raises:
        UserError: naming sizes that fit; or for a model that does not cut images into squares as a ViT does.
    """
    if not isinstance(patch, int):
        raise UserError(f"The model's patch_size is {patch}; expected one number, as of ViT's kind of models.")
    if patch < 1 or size % patch:
        fits = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise UserError(
            f"A patch size of {patch} does not divide images of {size} x {size} pixels: use one of {fits}, or another "
            "data.images.size."
        )


def with_head(base: ResolvedModel, names: list[str], size: int, seed: int, weights: bool = True) -> ResolvedModel:
    """Return a classifier of these classes: the model itself where it is one, else a copy with a new, seeded head.

    The copy lies in the cache and has its weights under the names that transformers' modules have today; older files
    have others, which transformers translates on loading, and a merge reads files by names.

    Args:
        base: a model folder that transformers' AutoModelForImageClassification loads, or one of shared layers.
        names: of the classes.
        size: of the images, in pixels.
        seed: of the new head.
        weights: False for a dry run: only the configuration is copied.

    Raises:
        UserError: when it was made for images of another size.
    """
    config = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    patch = config.get("patch_size")
    made_for = config.get("image_size", size if patch is None else 224)
    if made_for != size:
        raise UserError(
            f"'{base.name}' takes images of {made_for} x {made_for} pixels, and these have {size} x {size}: set "
            f"data.images.size={made_for}."
        )
    if patch is not None:  # else a convolutional network, which takes images of any size
        check_patches(patch, size)
    same = list(config.get("id2label", {}).values()) == names
    if same and (not weights or is_ours(base.folder) or not _renamed(base.folder)):
        return base
    identity = f"{base.fingerprint[:16] or 'shape'}-{seed}-{_short(names)}"
    folder = make_once(
        cache_root() / f"classifiers/{identity}", lambda made: _write(base.folder, made, names, seed, weights, same)
    )
    found = fingerprint(folder) if weights else ""
    return replace(base, folder=folder, fingerprint=found, headless=base.headless or base.fingerprint)


def _named(names: list[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def _short(names: list[str]) -> str:
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]


def _renamed(folder: Path) -> bool:
    """Tell whether a file's tensors have other names than the modules that transformers makes."""
    from safetensors import safe_open

    stored: set[str] = set()
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            stored |= set(opened.keys())
    return stored != set(_on_meta(folder).state_dict())


def _on_meta(folder: Path) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForImageClassification

    with torch.device("meta"):
        return AutoModelForImageClassification.from_config(
            AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        )


def _write(source: Path, folder: Path, names: list[str], seed: int, weights: bool, same: bool) -> None:
    from safetensors.torch import save_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False, **_named(names))
    config.architectures = [type(_on_meta(source)).__name__]
    config.save_pretrained(folder)
    if is_ours(source):
        shutil.copy(source / SHARING, folder)
    if not weights:
        return
    tensors = _tensors(source, config)
    if not same:
        place, width = _linear_of(_on_meta(source))
        made = _new_head(len(names), width, getattr(config, "initializer_range", STD), seed, tensors)
        tensors |= {f"{place}.{part}": tensor for part, tensor in made.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _tensors(source: Path, config: Any) -> dict[str, Any]:
    """Return the weights by the names of today's modules."""
    from safetensors.torch import load_file
    from transformers import AutoModelForImageClassification

    if is_ours(source):
        return {name: tensor for file in weight_files(source) for name, tensor in load_file(file).items()}
    model = with_new_head(AutoModelForImageClassification, source, config)
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def _new_head(classes: int, width: int, std: float, seed: int, tensors: dict[str, Any]) -> dict[str, Any]:
    import torch

    dtype = next(iter(tensors.values())).dtype
    weight = torch.empty(classes, width).normal_(0.0, std, generator=torch.Generator().manual_seed(seed))
    return {"weight": weight.to(dtype), "bias": torch.zeros(classes, dtype=dtype)}


def _linear_of(model: Any) -> tuple[str, int]:
    """Return the name and the inputs of the linear that gives the logits: the head, or the last part of it."""
    from torch import nn

    inside = [(name, module) for name, module in model.classifier.named_modules() if isinstance(module, nn.Linear)]
    name, linear = inside[-1]
    return f"{HEAD}.{name}".rstrip("."), linear.in_features


def with_new_head(auto: Any, source: Path, config: Any) -> Any:
    """Return a pretrained model of a folder; a head of another size than config's is made anew.

    Args:
        auto: an auto class of transformers for classifiers.
    """
    return auto.from_pretrained(
        source,
        config=config,
        ignore_mismatched_sizes=True,
        local_files_only=True,
        use_safetensors=True,
        dtype="auto",
        trust_remote_code=False,
    )
