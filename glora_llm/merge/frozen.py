"""The frozen weights exactly as training saw them, tensor by tensor from the base's files: never the whole model.

A quantised base was quantised from these files on loading; doing the same to one tensor and unpacking it again gives
the W0 that was trained, bit for bit on the same kind of device.
"""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from glora_llm.glora.frozen_weight import dense_weight
from glora_llm.launch.device import choose_device
from glora_llm.models.fingerprint import weight_files
from glora_llm.models.folder import read_sharing
from glora_llm.models.load import meta_model
from glora_llm.schema import ModelSection
from glora_llm.vlora import compose, compositions


class StoredTensors:
    """The weights of a model folder, read one at a time."""

    def __init__(self, folder: Path):
        self._files: dict[str, Any] = {}
        for file in weight_files(folder):
            opened = safe_open(file, framework="pt")
            self._files |= dict.fromkeys(opened.keys(), opened)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._files)

    def get(self, name: str) -> Tensor:
        """Return one tensor."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def numbers(self) -> int:
        """Return the count of numbers in all tensors, without reading them."""
        return sum(math.prod(file.get_slice(name).get_shape()) for name, file in self._files.items())


class ComposedTensors(StoredTensors):
    """A VLoRA folder read as the dense model that it computes.

    Args:
        model: of that folder; its layers share weights, and it need not hold any.
        dtype: what the model was computed in: parts are rounded to it before they are composed, as in training.
    """

    def __init__(self, folder: Path, model: nn.Module, dtype: torch.dtype):
        super().__init__(folder)
        self._made, self._dtype = compositions(model), dtype

    def __contains__(self, name: str) -> bool:
        return name in self._made or (super().__contains__(name) and not _is_increment(name))

    def names(self) -> list[str]:
        """Return the names of the dense model's tensors."""
        return [*self._made, *(name for name in super().names() if not _is_increment(name))]

    def get(self, name: str) -> Tensor:
        """Return one tensor, composed where layers share it."""
        made = self._made.get(name)
        if made is None:
            return super().get(name)
        ups, downs = ([self._part(part) for part in half] for half in (made.ups, made.downs))
        return compose(self._part(made.base), ups, downs, made.scale)

    def _part(self, name: str) -> Tensor:
        return super().get(name).to(self._dtype)

    def numbers(self) -> int:
        """Return the count of numbers in all tensors of the dense model, without reading them."""
        shapes = {name: self._files[name].get_slice(name).get_shape() for name in super().names()}
        own = sum(math.prod(shape) for name, shape in shapes.items() if not _is_increment(name))
        return own + sum(math.prod(shapes[made.base]) for made in self._made.values())


def _is_increment(name: str) -> bool:
    return name.endswith((".increment_a", ".increment_b"))


def stored_tensors(folder: Path, section: ModelSection, dtype: torch.dtype) -> StoredTensors:
    """Return the weights of a base's folder, as those of a dense model.

    Args:
        dtype: what the base was computed in.
    """
    if read_sharing(folder) is None:
        return StoredTensors(folder)
    return ComposedTensors(folder, meta_model(section, folder), dtype)


def trained_weight(weight: Tensor, section: ModelSection, dtype: torch.dtype) -> Tensor:
    """Return what a linear with this stored weight (O, I) computed with in training, in float32.

    Args:
        section: how the base was loaded; its quantisation counts.
        dtype: what the base was computed in.
    """
    weight = weight.to(dtype)
    if section.quantization == "none":
        return weight.float()
    device = choose_device()
    return dense_weight(quantised_linear(weight, section, dtype, device), dtype).float().cpu()


def quantised_linear(weight: Tensor, section: ModelSection, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return bitsandbytes' linear holding `weight` (O, I), with the settings that the model was loaded by."""
    from bitsandbytes import nn as bnb

    shape = (weight.shape[1], weight.shape[0])
    if section.quantization == "int8":
        layer = bnb.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
        layer.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        return layer.to(device)
    layer = bnb.Linear4bit(*shape, bias=False, compute_dtype=dtype, quant_type=section.quantization)
    layer.weight = bnb.Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=section.double_quantization,
        quant_type=section.quantization,
        quant_storage=dtype,
    )
    return layer.to(device)
