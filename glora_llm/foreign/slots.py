"""The result of every reader of a foreign adapter: the values of GLoRA's slots, layer by layer.

Letters: O out_features, I in_features, r rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glora_llm.errors import UserError, nearest
from glora_llm.glora.modes import make_slot
from glora_llm.glora.path import Genome, LayerPath, SlotSpec
from glora_llm.schema.slots import SLOTS


class Value(NamedTuple):
    """One slot of one layer: its mode, and its parameters by the names that `glora.modes` gives them."""

    spec: SlotSpec
    tensors: dict[str, Tensor]


LayerSlots = dict[str, Value]  # slot -> value


def lora(down: Tensor, up: Tensor, scale: float = 1.0) -> Value:
    """Return a slot `scale * down @ up`, from down (rows, r) and up (r, columns)."""
    return Value(SlotSpec("lora", up.shape[0], scale), {"down": down, "up": up})


def vector(values: Tensor) -> Value:
    """Return a slot of mode vector from a tensor that holds its elements in any shape."""
    return Value(SlotSpec("vector"), {"vector": values.reshape(-1)})


def scalar(value: Tensor) -> Value:
    """Return a slot of mode scalar from a tensor of one element."""
    return Value(SlotSpec("scalar"), {"scalar": value.reshape(1)})


@dataclass(frozen=True)
class Base:
    """The names and shapes of a base model, by which a foreign adapter is judged.

    Args:
        model: on the meta device, dense.
    """

    model: nn.Module

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The linears by their full names."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, nn.Linear)}

    def linear(self, name: str) -> nn.Linear:
        """Return the linear `name`.

        Raises:
            UserError: when the base has no module of that name, or it is no linear.
        """
        linears = self.linears
        if name in linears:
            return linears[name]
        modules = dict(self.model.named_modules())
        if name in modules:
            raise UserError(
                f"'{name}' is a {type(modules[name]).__name__} in the base, and GLoRA adapts linears alone."
            )
        raise UserError(
            f"The base has no layer '{name}', which the adapter has.{nearest(name, linears)} This is not the base that "
            "it was trained on."
        )


@dataclass
class Foreign:
    """An adapter in GLoRA's terms.

    Attributes:
        format: whose it was, in words.
        layers: name of a linear -> its slots.
        composition: of A in mode lora; None: no layer has one.
        saved_modules: names of modules that were trained in full (PEFT's modules_to_save).
        saved: their tensors, by their names in the base.
        copies: tensors of the base that the adapter holds as they were (PEFT keeps a head or embedding that it adapts).
        base_name: what the adapter calls its base; None where its format keeps no name.
    """

    format: str
    layers: dict[str, LayerSlots]
    composition: str | None = None
    saved_modules: list[str] = field(default_factory=list)
    saved: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    base_name: str | None = None

    def genome(self) -> Genome:
        """Return the path of every layer."""
        return {
            name: LayerPath(tuple((slot, slots[slot].spec) for slot in SLOTS if slot in slots))
            for name, slots in self.layers.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters of all slots as float32, by their names in the base model: NAME.slot_A.down."""
        return {
            f"{name}.slot_{slot}.{key}": tensor.float()
            for name, slots in self.layers.items()
            for slot, value in slots.items()
            for key, tensor in value.tensors.items()
        }

    def require_fits(self, base: Base) -> None:
        """Check names and shapes of every slot and every saved module against the base, and that all is finite.

        Raises:
            UserError: naming the layer and the slot.
        """
        for name, slots in self.layers.items():
            linear = base.linear(name)
            for slot, value in slots.items():
                self._require_slot(name, slot, value, linear)
        there: Mapping[str, Any] = dict(base.model.named_parameters(remove_duplicate=False))
        for name, tensor in self.saved.items():
            shape = tuple(there[name].shape) if name in there else "no such tensor"
            if tuple(tensor.shape) != shape:
                raise UserError(
                    f"{name} was trained in full with shape {tuple(tensor.shape)}, and the base has {shape}. This is "
                    "not the base that the adapter was trained on, or its vocabulary was resized."
                )
            _require_finite(name, tensor)
        wanted = [name for name in there if name.rpartition(".")[0].endswith(tuple(self.saved_modules))]
        missing = [name for name in wanted if name not in self.saved]
        if missing:
            raise UserError(f"modules_to_save is {self.saved_modules}, and the adapter holds no {missing[0]}.")

    def _require_slot(self, name: str, slot: str, value: Value, linear: nn.Linear) -> None:
        if slot == "D" and linear.bias is None:
            raise UserError(f"{name}: the adapter scales this layer's bias, and in the base it has none.")
        with torch.device("meta"):
            made = make_slot(slot, value.spec, self.composition or "product", linear.out_features, linear.in_features)
        for key, parameter in made.named_parameters():
            got, expected = tuple(value.tensors[key].shape), tuple(parameter.shape)
            if got != expected:
                raise UserError(
                    f"{name}: slot {slot} has {key} of shape {got}, and the base's layer "
                    f"({linear.out_features} outputs, {linear.in_features} inputs) needs {expected}. This is not the "
                    "base that the adapter was trained on."
                )
            _require_finite(f"{name}: {key} of slot {slot}", value.tensors[key])


def _require_finite(name: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise UserError(f"{name} holds values that are not finite: the adapter is broken.")
