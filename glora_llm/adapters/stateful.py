"""Adapter methods that keep a state beside their weights and take part in the training loop.

A further one is one class in a file of its own, and one entry of `STATEFUL_METHODS`.
"""

import json
from pathlib import Path
from typing import Any, ClassVar, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glora_llm.adapters.adalora import AdaLoRA
from glora_llm.adapters.frozen import load_frozen
from glora_llm.adapters.periodic_lora import PeriodicLora
from glora_llm.schema import AdapterSection
from glora_llm.training.penalty import GradientOf
from glora_llm.training.whole_state import WholeState


class StatefulMethod(Protocol):
    """The training-time part of one adapter method; it is made from the PEFT model that `inject` returned.

    Attributes:
        name: of the method in a recipe, and of its files in a checkpoint.
        model: whose adapter this is.
    """

    name: ClassVar[str]
    model: Any

    def __init__(self, model: Any) -> None:
        """Take the model whose adapter this is."""

    @staticmethod
    def config_arguments(section: AdapterSection, steps: int) -> dict[str, Any]:
        """Return the arguments of the method's PEFT configuration that follow from the recipe, for so many steps."""

    def penalty_gradients(self) -> dict[nn.Parameter, GradientOf]:
        """Return the gradient of what is added to the loss of every optimizer step, by parameter."""

    def attach(self, trained: WholeState) -> None:
        """Take the trained parameters of the engine, before the first step and before `load_state_dict`."""

    def step(self, skipped: bool) -> None:
        """Update the state; all processes call it after each optimizer step, applied or skipped."""

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state as tensors by name, and as values for JSON."""

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Set the state to what `state_dict` returned."""


STATEFUL_METHODS: dict[str, type[StatefulMethod]] = {method.name: method for method in (AdaLoRA, PeriodicLora)}


def stateful_method(model: Any, section: AdapterSection) -> StatefulMethod | None:
    """Return the training-time part of the section's method, or None where it has none."""
    kind = STATEFUL_METHODS.get(section.method)
    return None if kind is None else kind(model)


def save_state(method: StatefulMethod, folder: Path) -> None:
    """Write a method's state into an adapter folder: NAME.safetensors and NAME.json."""
    tensors, values = method.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{method.name}.safetensors")
    (folder / f"{method.name}.json").write_text(json.dumps(values), encoding="utf-8")


def load_state(method: StatefulMethod, folder: Path) -> None:
    """Set a method's state to the one that `save_state` wrote into an adapter folder."""
    values = json.loads((folder / f"{method.name}.json").read_text(encoding="utf-8"))
    method.load_state_dict(load_file(folder / f"{method.name}.safetensors"), values)
    load_frozen(method.model, folder)
