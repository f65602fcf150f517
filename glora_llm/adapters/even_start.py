"""Weights of an adapter in even scaling as the start of another run: other factors, and the same function.

A run's factors are of its own structure: the slots that a layer has share its step out (`even.even_scales`). A genome
has its weights from a supernet, whose layers may have more slots, and factors that are smaller by that. So a new run
measures its own, and what a factor gains is taken off the parameter. A step then moves each layer by as much as in an
adapter of this structure that is trained from the start.
"""

from typing import Any

from torch import nn

from glora_llm.adapters.even import Scales
from glora_llm.adapters.inject import adapted_layers
from glora_llm.glora.path import PEFT_ROOT
from glora_llm.glora.supernet import MODE_OF


def start_gains(model: nn.Module, saved: Scales | None, names: list[str]) -> dict[str, float]:
    """Return what saved parameters are multiplied by so that they mean the same under a model's own factors.

    Args:
        model: with its factors set.
        saved: those that the weights were trained with; None: all were 1.
        names: of the parameters, as PEFT saves them. Of two factors the one that begins as zero is multiplied.
    """
    layers: dict[str, Any] = {**adapted_layers(model)}
    found = {}
    for name in names:
        place, is_slot, rest = name.removeprefix(PEFT_ROOT).partition(".slot_")
        if is_slot and not rest.endswith("up"):
            slot, _, part = rest.partition(".")
            mode = MODE_OF.get(part, part)
            here = layers[place].factor("default", slot, mode)
            found[name] = (saved or {}).get(place, {}).get(slot, {}).get(mode, 1.0) / here
    return found
