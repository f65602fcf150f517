"""List, load and save the trained weights of an adapter."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from glora_llm.errors import UserError
from glora_llm.glora.learning_rates import lr_factors
from glora_llm.schema import AdapterSection
from glora_llm.training.optim import Trainable


def trainables(model: nn.Module, section: AdapterSection, loraplus_ratio: float) -> list[Trainable]:
    """Return the trained parameters by name, with the factor on the learning rate of each."""
    factors = dict(lr_factors(model, dict(section.lr_factors or {}), loraplus_ratio)) | _loraplus(model, loraplus_ratio)
    return [
        Trainable(name, parameter, factors.get(id(parameter), 1.0))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def _loraplus(model: nn.Module, ratio: float) -> dict[int, float]:
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return {id(p): ratio for layer in layers for p in layer.lora_B.parameters()}


def load_start(items: list[Trainable], folder: Path) -> None:
    """Set the trained parameters to the weights of an adapter folder of the same slots.

    Raises:
        UserError: when a weight is missing, left over, or of another shape.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"adapter.weights: {folder} holds no adapter_model.safetensors.")
    weights = load_file(file)
    for item in items:
        name = item.name.replace(".modules_to_save.default", "").replace(".default", "")  # as PEFT saves it
        weight = weights.pop(name, None)
        if weight is None or weight.shape != item.parameter.shape:
            got = "is missing" if weight is None else f"has shape {tuple(weight.shape)}"
            raise UserError(f"adapter.weights: {name} {got} in {folder}; expected {tuple(item.parameter.shape)}.")
        item.parameter.data.copy_(weight)
    if weights:
        raise UserError(f"adapter.weights: {folder} has {next(iter(weights))}, which this adapter has not.")


def save_adapter(model: Any, tensors: dict[str, Tensor], folder: Path, base_name: str) -> None:
    """Write a PEFT adapter folder from float32 master weights (`master/NAME` -> tensor)."""
    weights = {name.removeprefix("master/"): t for name, t in tensors.items() if name.startswith("master/")}
    for config in model.peft_config.values():
        config.base_model_name_or_path = base_name
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
