"""Trained parameters of a model with its adapter: by slot, by kind of module and by layer."""

from typing import Any, NamedTuple

from glora_llm.glora.path import PEFT_ROOT
from glora_llm.plan.part_names import in_order, kind_of_module, layer_of, slot_of
from glora_llm.training.sharding import element_count


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
        for table, key in zip(counts, (slot_of(name), kind_of_module(name), layer_of(name)), strict=True):
            table[key] = table.get(key, 0) + number
    return counts._replace(by_slot=dict(sorted(counts.by_slot.items())), by_layer=in_order(counts.by_layer))
