"""A model with one layer's frozen weights in memory at a time: read from its files when the layer is called.

A model streams when its files name the tensors as its modules do, whatever its family; adapters of PEFT stay in memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glora_llm.evaluation.progress import Progress
from glora_llm.models.config_file import load_config
from glora_llm.models.families import auto_class, layers
from glora_llm.models.folder import share
from glora_llm.models.load import linear_names
from glora_llm.models.stored import StoredTensors
from glora_llm.vlora import VLoRALinear


@dataclass(frozen=True)
class HollowModel:
    """A model whose matrices take no memory: each is one number, expanded to the shape.

    Attributes:
        model: of transformers, in eval mode. Buffers, norms and biases are real.
        names: placeholder -> name of its tensor in the files.
        stored: those files.
        linears: of the body, by module.
    """

    model: Any
    names: dict[nn.Parameter, str]
    stored: StoredTensors
    linears: list[nn.Module]


def hollow_model(folder: Path, dtype: torch.dtype, device: torch.device) -> HollowModel | None:
    """Build the model of a folder without its matrices; None where its files do not hold what its modules name."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    config = load_config(folder)
    if not hasattr(config.get_text_config(decoder=True), "num_hidden_layers"):
        return None  # a convolutional network: no list of like layers, and batch norms with stored statistics
    with init_empty_weights(include_buffers=False), no_init_weights():  # buffers are computed: rotary frequencies
        model: Any = auto_class(config).from_config(config, dtype=dtype)
    model.tie_weights()
    with torch.device("meta"):
        share(model, folder)
    stored = StoredTensors(folder)
    names = _stored_names(model, stored)
    if names is None or model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
        return None
    made = {parameter: _placeholder(parameter, stored.get, name, device) for parameter, name in names.items()}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            module._parameters[key] = None if parameter is None else made[parameter]
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)
    model.requires_grad_(False).config.use_cache = False
    matrices = {made[parameter]: name for parameter, name in names.items() if parameter.dim() > 1}
    return HollowModel(model.eval(), matrices, stored, [model.get_submodule(name) for name in linear_names(model)])


def _stored_names(model: nn.Module, stored: StoredTensors) -> dict[nn.Parameter, str] | None:
    """Return the stored name of every parameter (a tied one has several in the model), or None where one has none."""
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in stored and stored.shape(name) == parameter.shape:
            names.setdefault(parameter, name)
    return names if all(parameter in names for parameter in model.parameters()) else None


def _placeholder(
    parameter: nn.Parameter, read: Callable[[str], Tensor], name: str, device: torch.device
) -> nn.Parameter:
    if parameter.dim() > 1:
        value = torch.zeros(1, dtype=parameter.dtype, device=device).expand(parameter.shape)
    else:  # small, and an adapter may train it
        value = read(name).to(device, parameter.dtype)
    return nn.Parameter(value, requires_grad=False)


class WeightStream:
    """Reads the matrices of each part of a model before its forward pass, and drops them after it.

    A part is a layer of the model, or what holds matrices outside of the layers: embedding, output head.

    Args:
        hollow: the model, whose modules an adapter may have wrapped since.
        quantise: weight (O, I) -> a quantised linear without bias, for the linears of the body; None: they stay dense.
        title: of a progress bar over the parts; empty: no bar.

    Attributes:
        parts: in the order of the model.
        owners: placeholder -> the modules that hold it, each with the name of the parameter there.
    """

    def __init__(
        self,
        hollow: HollowModel,
        quantise: Callable[[Tensor], Any] | None = None,
        title: str = "",
    ):
        self.hollow, self.quantise = hollow, quantise
        self.quantised = set(hollow.linears) if quantise else set()
        self.owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in hollow.model.modules():
            for key, parameter in module._parameters.items():
                if parameter in hollow.names:
                    self.owners.setdefault(parameter, []).append((module, key))
        self.parts = list(dict.fromkeys(self._find_parts(hollow.model, set(layers(hollow.model)))))
        self.progress = Progress(len(self.parts), title, "part")
        for part in self.parts:
            matrices, linears_here = self._matrices(part), self._quantised(part)
            part.register_forward_pre_hook(partial(self._load, matrices, linears_here))
            part.register_forward_hook(partial(self._drop, matrices, linears_here))

    def _find_parts(self, module: nn.Module, whole: set[nn.Module]) -> Iterator[nn.Module]:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        reads = any(parameter is not None for parameter in module._parameters.values())
        replaces = any(child in self.quantised for child in module.children())
        if module in whole or reads or replaces or isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            yield module
            return
        for child in module.children():
            yield from self._find_parts(child, whole)

    def _matrices(self, part: nn.Module) -> list[nn.Parameter]:
        """Return the placeholders that a part computes with, also those of other layers that it shares weights with."""
        found: dict[nn.Parameter, None] = {}
        for module in part.modules():
            if module not in self.quantised:
                held = module.parts() if isinstance(module, VLoRALinear) else module._parameters.values()
                found |= dict.fromkeys(p for p in held if p in self.hollow.names)
        return list(found)

    def _quantised(self, part: nn.Module) -> list[tuple[nn.Module, str, Any]]:
        """Return the linears of a part that are replaced by quantised ones: parent, name there, linear."""
        return [
            (parent, key, child)
            for parent in part.modules()
            for key, child in parent._modules.items()
            if child in self.quantised
        ]

    def _read(self, placeholder: nn.Parameter) -> nn.Parameter:
        value = self.hollow.stored.get(self.hollow.names[placeholder])
        return nn.Parameter(value.to(placeholder.device, placeholder.dtype), requires_grad=False)

    def _load(self, matrices: list[nn.Parameter], linears: list[tuple[nn.Module, str, Any]], *_: Any) -> None:
        self.progress.update()
        for placeholder in matrices:
            value = self._read(placeholder)
            for owner, key in self.owners[placeholder]:
                owner._parameters[key] = value
        for parent, key, linear in linears:
            assert self.quantise is not None
            made = self.quantise(self._read(linear.weight)).eval()
            made.bias = linear.bias
            parent._modules[key] = made

    def _drop(self, matrices: list[nn.Parameter], linears: list[tuple[nn.Module, str, Any]], *_: Any) -> None:
        for placeholder in matrices:
            for owner, key in self.owners[placeholder]:
                owner._parameters[key] = placeholder
        for parent, key, linear in linears:
            parent._modules[key] = linear
