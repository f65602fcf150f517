"""Adapter methods that keep a state beside their weights and take part in the training loop.

A further one is one class in a file of its own, and one entry of `STATEFUL_METHODS`.
"""

import json
from pathlib import Path
from typing import Any, ClassVar, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from glora_llm.adapters.adalora import AdaLoRA
from glora_llm.schema import AdapterSection


class StatefulMethod(Protocol):
    """The training-time part of one adapter method; it is made from the PEFT model that `inject` returned.

    Attributes:
        name: of the method in a recipe, and of its files in a checkpoint.
        needs_whole_gradients: `step` reads the gradients of all parameters, which only ZeRO 0 keeps.
    """

    name: ClassVar[str]
    needs_whole_gradients: ClassVar[bool]

    def __init__(self, model: Any) -> None:
        """Take the model whose adapter this is."""

    @staticmethod
    def config_arguments(section: AdapterSection, steps: int) -> dict[str, Any]:
        """Return the arguments of the method's PEFT configuration that follow from the recipe, for so many steps."""

    def penalty(self) -> Tensor:
        """Return a scalar that is added to the loss of every optimizer step."""

    def step(self) -> None:
        """Update the state; called between the optimizer's step and the clearing of the gradients."""

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state as tensors by name, and as values for JSON."""

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Set the state to what `state_dict` returned."""


STATEFUL_METHODS: dict[str, type[StatefulMethod]] = {method.name: method for method in (AdaLoRA,)}


def stateful_method(model: Any, section: AdapterSection) -> StatefulMethod | None:
    """Return the training-time part of the section's method, or None where it has none."""
    kind = STATEFUL_METHODS.get(section.method)
    return None if kind is None else kind(model)


def needs_whole_gradients(section: AdapterSection) -> bool:
    """Tell whether the section's method reads the gradients of all parameters after each step."""
    kind = STATEFUL_METHODS.get(section.method)
    return kind is not None and kind.needs_whole_gradients


def save_state(method: StatefulMethod, folder: Path) -> None:
    """Write a method's state into an adapter folder: NAME.safetensors and NAME.json."""
    tensors, values = method.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{method.name}.safetensors")
    (folder / f"{method.name}.json").write_text(json.dumps(values), encoding="utf-8")


def load_state(method: StatefulMethod, folder: Path) -> None:
    """Set a method's state to the one that `save_state` wrote into an adapter folder."""
    values = json.loads((folder / f"{method.name}.json").read_text(encoding="utf-8"))
    method.load_state_dict(load_file(folder / f"{method.name}.safetensors"), values)
