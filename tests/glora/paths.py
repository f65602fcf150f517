"""Every path of one layer, for tests that enumerate them."""

import itertools

from glora_llm.glora.path import LayerPath, SlotSpec
from glora_llm.schema.slots import SLOT_MODES, SLOTS


def all_paths(rank: int, scale: float = 1.0, has_bias: bool = True) -> list[LayerPath]:
    """Return every path of one layer: 4*4*3*3*3 = 432, or 4*4*3*3 = 144 where there is no bias (D does nothing)."""
    choices = [SLOT_MODES[slot] if slot != "D" or has_bias else ("none",) for slot in SLOTS]
    return [
        LayerPath(
            tuple(
                (slot, SlotSpec(mode, rank, scale) if mode == "lora" else SlotSpec(mode))
                for slot, mode in zip(SLOTS, modes, strict=True)
                if mode != "none"
            )
        )
        for modes in itertools.product(*choices)
    ]
