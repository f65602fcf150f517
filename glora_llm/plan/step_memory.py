"""Peak memory of one training step, found without weights and without a GPU.

The project's own model, adapter and objective run forward and backward on torch's fake tensors, which have shapes,
dtypes and storages of a size, but no values. A dispatch mode adds up the storages that are alive after each operation.

The peak is an affine function of the number of like layers: each further one adds what it keeps for the backward pass,
and computes in the memory that the layer before it has given back. So a model of two layers and one of three are
measured, and the line through both gives the whole model. Attention is torch's fused one, which keeps for the backward
pass what variable-length attention keeps.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from glora_llm.adapters.inject import inject, without_adapter
from glora_llm.data.batch import collate
from glora_llm.data.store import Row
from glora_llm.models.families import layers
from glora_llm.models.load import linear_names, meta_model
from glora_llm.plan.quantized_shape import QuantizedShape
from glora_llm.schema import AdapterSection, ModelSection
from glora_llm.training.batch import Batch
from glora_llm.training.objectives import CausalLMObjective

FEW = (2, 3)  # layers of the models that are measured


@dataclass(frozen=True)
class StepShape:
    """All that the memory of a step depends on.

    Args:
        model: with `dtype` float32, bfloat16 or float16.
        folder: holds config.json.
        adapter: what is trained.
        rows: of one micro batch, B.
        tokens: of one row, T; each is a target.
        adapter_dtype: in which trained weights stand in the model.
    """

    model: ModelSection
    folder: Path
    adapter: AdapterSection
    rows: int
    tokens: int
    adapter_dtype: torch.dtype


def step_peak(shape: StepShape) -> int:
    """Return the most bytes that a micro batch needs beside weights and gradients at rest."""
    few, more = (measured_peak(shape, count) for count in FEW)
    return few + (layer_count(shape) - FEW[0]) * (more - few)


def layer_count(shape: StepShape) -> int:
    """Return the number of like layers of the whole model."""
    return len(layers(meta_model(shape.model, shape.folder)))


def measured_peak(shape: StepShape, count: int) -> int:
    """Return the same of a model of so many layers.

    A gradient is let go as soon as it is whole, as DeepSpeed does: what stays of it is counted at rest.
    """
    model = _adapted(shape, count)
    with FakeTensorMode() as mode:
        _become_fake(model)
        objective = CausalLMObjective(without_adapter(model)).train()
        batch = {name: _fake_copy(value, mode) for name, value in _full_batch(shape).items()}
        tensors = [value for value in batch.values() if isinstance(value, Tensor)]
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_let_go)
        with LiveStorages([*objective.parameters(), *objective.buffers(), *tensors]) as live:
            objective(**batch).backward()
    return live.peak


class LiveStorages(TorchDispatchMode):
    """Adds up the storages that are made while it is active, and remembers the most that were alive together.

    Args:
        known: tensors that were there before; they are not counted.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.total = 0  # bytes of `live`, of which some may have gone already
        self.peak = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        if self.total > self.peak:  # only then does it matter which have gone
            gone = [key for key, (storage, _) in self.live.items() if storage.expired()]
            self.total -= sum(self.live.pop(key)[1] for key in gone)
            self.peak = max(self.peak, self.total)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        held = self.live.get(key)
        if held is not None and not held[0].expired():
            return
        self.total += storage.nbytes() - (held[1] if held else 0)  # an address may serve again
        self.live[key] = (StorageWeakRef(storage), storage.nbytes())


def quantized_shapes(model: Any, section: ModelSection) -> dict[str, QuantizedShape]:
    """Return how bitsandbytes stores each linear that it quantises, by the linear's name."""
    if section.quantization == "none":
        return {}
    dtype = getattr(torch, section.dtype)
    how = (section.quantization, dtype, section.double_quantization)
    return {name: QuantizedShape(model.get_submodule(name), *how) for name in linear_names(model)}


def without_start(section: AdapterSection) -> AdapterSection:
    """Leave out a start that PEFT computes from the weights (PiSSA, OLoRA): a model without weights has none."""
    rest = {name: value for name, value in (section.peft or {}).items() if name != "init_lora_weights"}
    return section.model_copy(update={"peft": rest or None})


def _uniform(section: AdapterSection) -> AdapterSection:
    """Give every layer the same slots, so that few layers stand for all; slots are a small part of a step's memory."""
    paths = section.paths if section.is_supernet else None
    return without_start(section).model_copy(update={"paths": paths, "genome": None})


def _adapted(shape: StepShape, count: int) -> Any:
    """Return the model on the meta device: `count` layers, quantised, adapters injected."""
    model = meta_model(shape.model, shape.folder)
    del layers(model)[count:]
    model.config.get_text_config(decoder=True).num_hidden_layers = count
    for name, quantized in quantized_shapes(model, shape.model).items():
        model.set_submodule(name, quantized.empty_linear(model.get_submodule(name).bias))
        model.is_loaded_in_4bit = True  # PEFT chooses its layers by it
    if shape.model.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    adapted = inject(model, _uniform(shape.adapter), seed=0, steps=1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(shape.adapter_dtype)
    return adapted


def _become_fake(model: nn.Module) -> None:
    """Replace what a model holds on the meta device by fake tensors of the CPU; ties stay ties."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = made.setdefault(id(parameter), _fake_parameter(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _fake(buffer)


def _fake_parameter(parameter: Any) -> nn.Parameter:
    fake: Any = nn.Parameter(_fake(parameter), requires_grad=parameter.requires_grad)
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        fake.quant_state, fake.compress_statistics, fake.quant_type = (
            state, parameter.compress_statistics, parameter.quant_type,
        )  # fmt: skip
        for part in filter(None, (state, state.state2)):
            part.absmax, part.code = _fake(part.absmax), _fake(part.code)
        state.offset = None if state.offset is None else _fake(state.offset)
    return fake


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _fake_copy(value: Any, mode: FakeTensorMode) -> Any:
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


def _full_batch(shape: StepShape) -> Batch:
    tokens = np.zeros(shape.tokens, dtype=np.int32)
    row = Row(tokens, np.ones(shape.tokens, dtype=np.bool_), [0])
    return collate([row] * shape.rows, pad_id=0)


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None
