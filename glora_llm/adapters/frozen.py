"""Frozen tensors of an adapter, saved in its folder beside the trained ones: the factors that PeriodicLoRA unloaded."""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from glora_llm.adapters.periodic_lora import PAST
from glora_llm.adapters.start import ADAPTER_WEIGHTS


def is_frozen(name: str) -> bool:
    """Tell whether a saved tensor is none that is trained."""
    return PAST in name


def load_frozen(model: Any, folder: Path) -> None:
    """Set what an adapter holds beside its trained parameters to what a folder holds, if that is anything.

    Args:
        model: the PEFT model that `inject` returned.
        folder: that PEFT saved.
    """
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        saved: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys() if is_frozen(name)}  # noqa: SIM118
    for name, tensor in saved.items():  # PEFT's own function wants the modules that are saved in full beside them
        owner, _, kind = name.rpartition(".")
        past = model.get_submodule(f"{owner}.default")
        setattr(past, kind, tensor.to(getattr(past, kind)))
