"""Peak memory of one forward and backward pass, by part, found without weights and without a GPU.

The project's own model, adapter and objective run forward and backward on torch's fake tensors, which have shapes,
dtypes and storages of a size, but no values. A dispatch mode adds up the storages that are alive after each operation.

The peak is an affine function of the number of like layers: each further one adds what it keeps for the backward pass,
and computes in the memory that the layer before it has given back. So a model of two layers and one of three are
measured, and the line through both gives the whole model; layers that differ (VLoRA's, which share weights, or those of
an adapter that is in some of them alone) are all measured. Attention on a GPU is torch's fused one, which keeps for the
backward pass what variable-length attention keeps.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from glora_llm.adapters.inject import adapted_layers, inject, without_adapter
from glora_llm.data.batch import collate
from glora_llm.data.store import Row
from glora_llm.glora.slopes import slopes
from glora_llm.models.attention import SEGMENTS, register
from glora_llm.models.families import layers
from glora_llm.models.load import linear_names, meta_model
from glora_llm.plan.live_storages import LiveStorages
from glora_llm.plan.quantized_shape import QuantizedShape
from glora_llm.schema import AdapterSection, ModelSection
from glora_llm.training.batch import Batch
from glora_llm.training.objectives import CausalLMObjective

Purpose = Literal["training", "scoring", "slopes"]
FEW = (2, 3)  # layers of the models that are measured


@dataclass(frozen=True)
class StepParts:
    """Bytes that are alive at the peak of a pass, beside weights and whole gradients.

    Args:
        activations: made by the forward pass, the batch left out.
        logits: made in the output head, its gradients included; with the loss's own states.
        workspace: made by the backward pass: gradients on their way, layers that are computed again.
    """

    activations: int = 0
    logits: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        """The peak."""
        return self.activations + self.logits + self.workspace

    def further(self, other: "StepParts", count: int) -> "StepParts":
        """Return these parts, and `count` times what `other` has more."""
        mine, theirs = vars(self), vars(other)
        return StepParts(**{name: mine[name] + count * (theirs[name] - mine[name]) for name in mine})


@dataclass(frozen=True)
class StepShape:
    """All that the memory of a pass depends on.

    Args:
        model: with `dtype` float32, bfloat16 or float16.
        folder: holds config.json.
        adapter: what is trained.
        rows: of one micro batch, B.
        tokens: of one row, T; each is a target.
        adapter_dtype: in which trained weights stand in the model.
        batch: the batch itself, in place of B full rows; its values do not matter.
        objective: model -> the objective; None: that of causal language models.
        purpose: `training`; `scoring`, where nothing is differentiated; `slopes`, the importance for a search.
        segments: attention goes segment by segment, as on a CPU.
        alike: layers are, so that a few stand for all.
    """

    model: ModelSection
    folder: Path
    adapter: AdapterSection
    rows: int
    tokens: int
    adapter_dtype: torch.dtype
    batch: Batch | None = None
    objective: Callable[[Any], nn.Module] = CausalLMObjective
    purpose: Purpose = "training"
    segments: bool = False
    alike: bool = True

    def key(self) -> tuple[Any, ...]:
        """Return what the result depends on, to find it again."""
        config = (self.folder / "config.json").read_text(encoding="utf-8")
        batch = self.batch or {}
        sizes = tuple((name, tuple(getattr(value, "shape", (value,)))) for name, value in batch.items())
        sections = (config, self.model.model_dump_json(), self.adapter.model_dump_json(), str(self.adapter_dtype))
        return (*sections, self.rows, self.tokens, sizes, self.purpose, self.segments, self.alike)


_known: dict[tuple[Any, ...], StepParts] = {}


def step_peak(shape: StepShape) -> int:
    """Return the most bytes that a micro batch needs beside weights and gradients at rest."""
    return step_parts(shape).total


def step_parts(shape: StepShape) -> StepParts:
    """Return the same by part; what was found before in this process is known."""
    key = shape.key()
    if key not in _known:
        _known[key] = _found_parts(shape)
    return _known[key]


def _found_parts(shape: StepShape) -> StepParts:
    count = layer_count(shape)
    if not shape.alike or count <= FEW[-1]:
        return measured_parts(shape, count)
    few, more = (measured_parts(shape, number) for number in FEW)
    return few.further(more, count - FEW[0])


def layer_count(shape: StepShape) -> int:
    """Return the number of like layers of the whole model."""
    return len(layers(meta_model(shape.model, shape.folder)))


def measured_peak(shape: StepShape, count: int) -> int:
    """Return the peak of a model of so many layers."""
    return measured_parts(shape, count).total


def measured_parts(shape: StepShape, count: int) -> StepParts:
    """Return the peak of a model of so many layers, by part.

    A gradient is let go as soon as it is whole, as DeepSpeed does: what stays of it is counted at rest.
    """
    model = _adapted(shape, count)
    with FakeTensorMode() as mode:
        _become_fake(model)
        objective: Any = shape.objective(without_adapter(model)).train(shape.purpose == "training")
        if hasattr(objective, "vary"):
            objective.vary = None  # how images are varied depends on drawn values; it is done before the model
        full = _full_batch(shape) if shape.batch is None else shape.batch
        batch = {name: _fake_copy(value, mode) for name, value in full.items()}
        tensors = [value for value in batch.values() if isinstance(value, Tensor)]
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_let_go)
        known = [*objective.parameters(), *objective.buffers(), *tensors]
        with LiveStorages(known) as live, _told_of_head(model, live):
            _run(shape.purpose, model, objective, batch, live)
    return StepParts(**live.at_peak)


def _run(purpose: Purpose, model: Any, objective: Any, batch: Batch, live: LiveStorages) -> None:
    """Run the passes of one batch."""
    if purpose == "scoring":
        with torch.no_grad():
            objective(**batch, score=True)
        return

    def loss() -> Tensor:
        value: Tensor = objective(**batch)
        live.part = "workspace"
        return value

    if purpose == "slopes":
        slopes(adapted_layers(model), loss)
    else:
        loss().backward()


@contextlib.contextmanager
def _told_of_head(model: Any, live: LiveStorages) -> Iterator[None]:
    """Count what is made while the output head runs, the loss included, as logits."""
    base = without_adapter(model)
    output = base.get_output_embeddings()
    if output is None:  # an image classifier, whose head is small
        yield
        return
    before: list[str] = []

    def enter(*_: Any) -> None:
        before.append(live.part)
        live.part = "logits"

    def leave(*_: Any) -> None:
        live.part = before.pop()

    handles = [output.register_forward_pre_hook(enter), output.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    if shape.segments:
        register()
        model.config._attn_implementation = SEGMENTS
    for name, quantized in quantized_shapes(model, shape.model).items():
        model.set_submodule(name, quantized.empty_linear(model.get_submodule(name).bias))
        model.is_loaded_in_4bit = True  # PEFT chooses its layers by it
    if shape.model.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    section = _uniform(shape.adapter) if shape.alike else without_start(shape.adapter)
    adapted = inject(model, section, seed=0, steps=1)
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
