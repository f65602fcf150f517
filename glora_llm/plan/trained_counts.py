"""Trained parameters of a model with its adapter: by slot, by kind of module and by layer."""

import re
from typing import Any, NamedTuple

from glora_llm.glora.path import PEFT_ROOT
from glora_llm.training.sharding import element_count

SLOT = re.compile(r"\.slot_([A-E])\.|\.(lora_[A-Za-z_]+|ia3_l|vera_lambda_[bd])(?:\.|$)")
ADAPTER_PART = re.compile(r"\.(slot_[A-E]|lora_\w+|ia3_l|vera_\w+|modules_to_save|base_layer)(\.|$)")
LAYER = re.compile(r"\.(\d+)\.")


class TrainedCounts(NamedTuple):
    """Numbers of trained elements, each dividing the same total."""

    by_slot: dict[str, int]
    by_kind: dict[str, int]
    by_layer: dict[str, int]

    @property
    def total(self) -> int:
        """All trained elements."""
        return sum(self.by_kind.values())


def trained_counts(model: Any) -> TrainedCounts:
    """Count the parameters that learn of what `adapters.inject` returned; weights may be on the meta device.

    A slot is A to E of GLoRA, a factor of LoRA, or `weights` of what is trained as it is; a kind is the name of the
    module (`q_proj`); a layer is its number, or `other`.
    """
    counts = TrainedCounts({}, {}, {})
    for full, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name, number = full.removeprefix(PEFT_ROOT), element_count(parameter)
        layer = LAYER.search(f".{name}")
        for table, key in zip(counts, (_slot(name), _kind(name), layer[1] if layer else "other"), strict=True):
            table[key] = table.get(key, 0) + number
    order = sorted(counts.by_layer, key=lambda key: (not key.isdigit(), int(key) if key.isdigit() else 0))
    return counts._replace(
        by_slot=dict(sorted(counts.by_slot.items())), by_layer={key: counts.by_layer[key] for key in order}
    )


def _slot(name: str) -> str:
    found = SLOT.search(name)
    return (found[1] or found[2]) if found else "weights"


def _kind(name: str) -> str:
    part = ADAPTER_PART.search(name)
    owner = name[: part.start()] if part else name.rpartition(".")[0]
    return owner.rpartition(".")[2] or owner
