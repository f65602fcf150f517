"""The weights of a model folder, one tensor in memory at a time."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from glora_llm.errors import UserError
from glora_llm.models.fingerprint import read_header, weight_files
from glora_llm.models.folder import read_sharing
from glora_llm.models.load import meta_model
from glora_llm.schema import ModelSection
from glora_llm.vlora import compositions
from glora_llm.vlora.layer import FACTORS

COPIED_AT_ONCE = 2**24  # bytes
SMALL = 2**20  # bytes


class StoredTensors:
    """The weights of a model folder, read one at a time.

    A file is open only while a tensor is read from it: the pages of a mapped file count as memory of the process.

    Raises:
        UserError: when the folder holds no complete safetensors model.
    """

    def __init__(self, folder: Path):
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as opened:
                self._files |= dict.fromkeys(opened.keys(), file)
                self._shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor, without reading it."""
        return self._shapes[name]

    def get(self, name: str) -> Tensor:
        """Return one tensor.

        A small one that is no matrix is copied: each tensor that is kept as it was read holds a mapping of its file,
        with pages of its neighbours, and a model has hundreds of norms and biases. A matrix stays where it lies in the
        file: products of one that is aligned otherwise are rounded otherwise, and no layer keeps it.
        """
        with safe_open(self._files[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor.clone() if tensor.dim() != 2 and tensor.nbytes <= SMALL else tensor

    def numbers(self) -> int:
        """Return the count of numbers in all tensors, without reading them."""
        return sum(math.prod(shape) for shape in self._shapes.values())


def require_stored(model: nn.Module, folder: Path) -> None:
    """Check that the files of a folder hold what its config.json describes: every tensor, in its shape, and no other.

    Args:
        model: built of that config.json; its modules are named as its tensors are in the files.

    Raises:
        UserError: naming the first tensor that is missing, of another shape, or has no place.
    """
    stored = StoredTensors(folder)
    known = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, parameter in model.named_parameters():  # of tied ones, the first
        shape = stored.shape(name) if name in stored else None
        if shape != tuple(parameter.shape):
            got = "is missing" if shape is None else f"has shape {shape}"
            raise UserError(
                f"{folder}: {name} {got}; config.json asks for {tuple(parameter.shape)}. The folder does not hold the "
                "whole model: download or copy it again."
            )
    extra = [name for name in stored.names() if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if extra:
        raise UserError(
            f"{folder}: the files hold {len(extra)} tensors that config.json has no place for, the first: {extra[0]}. "
            "One of them is of another model: download or copy it again."
        )


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
        return name in self._made or (super().__contains__(name) and not is_increment(name))

    def names(self) -> list[str]:
        """Return the names of the dense model's tensors."""
        return [*self._made, *(name for name in super().names() if not is_increment(name))]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor of the dense model, without reading it."""
        made = self._made.get(name)
        return super().shape(name if made is None else made.base)

    def get(self, name: str) -> Tensor:
        """Return one tensor, composed where layers share it."""
        made = self._made.get(name)
        if made is None:
            return super().get(name)
        return made.compose(self._part)

    def _part(self, name: str) -> Tensor:
        return super().get(name).to(self._dtype)

    def numbers(self) -> int:
        """Return the count of numbers in all tensors of the dense model, without reading them."""
        return sum(math.prod(self.shape(name)) for name in self.names())


def is_increment(name: str) -> bool:
    """Tell whether a tensor is part of a VLoRA increment, or a base beside one, which a dense model has not."""
    return name.rpartition(".")[2] in FACTORS or name.endswith(".compound_base.weight")


def stored_tensors(folder: Path, section: ModelSection, dtype: torch.dtype) -> StoredTensors:
    """Return the weights of a folder, as those of a dense model.

    Args:
        dtype: what the model was computed in.
    """
    if read_sharing(folder) is None:
        return StoredTensors(folder)
    return ComposedTensors(folder, meta_model(section, folder), dtype)


def copy_tensors(source: Path, target: Path, prefix: str) -> None:
    """Write a safetensors file with the tensors of another whose names begin with a prefix, named without it.

    The bytes are copied as they are, a piece at a time, whatever the size of the file.

    Raises:
        UserError: when `source` is no complete safetensors file.
    """
    table, start = read_header(source)
    chosen = sorted((entry["data_offsets"][0], name) for name, entry in table.items() if name.startswith(prefix))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for begin, name in chosen:
        end = at + table[name]["data_offsets"][1] - begin
        header[name.removeprefix(prefix)] = table[name] | {"data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    with source.open("rb") as reader, target.open("wb") as writer:
        writer.write(len(text).to_bytes(8, "little") + text)
        for begin, name in chosen:
            reader.seek(start + begin)
            left = table[name]["data_offsets"][1] - begin
            while left:
                left -= writer.write(reader.read(min(left, COPIED_AT_ONCE)))
