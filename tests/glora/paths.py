"""Every path of one layer, for tests that enumerate them."""

import itertools

from glora_llm.glora.path import LayerPath, SlotSpec
from glora_llm.schema.slots import RANKED_MODES, SLOTS, SUPERNET_MODES


def all_paths(rank: int, scale: float = 1.0, has_bias: bool = True) -> list[LayerPath]:
    """Return every path of one layer: 4*4*3*3*3 = 432, or 4*4*3*3 = 144 where there is no bias (D does nothing).

    Those with A in mode block, which needs 64 inputs or more, are `block_paths`.
    """
    return _paths(SUPERNET_MODES, rank, scale, has_bias)


def block_paths(rank: int, scale: float = 1.0, has_bias: bool = True) -> list[LayerPath]:
    """Return every path with A in mode block: 4*3*3*3 = 108, or 4*3*3 = 36 where there is no bias."""
    return _paths(SUPERNET_MODES | {"A": ("block",)}, rank, scale, has_bias)


def _paths(modes_of: dict[str, tuple[str, ...]], rank: int, scale: float, has_bias: bool) -> list[LayerPath]:
    choices = [modes_of[slot] if slot != "D" or has_bias else ("none",) for slot in SLOTS]
    return [
        LayerPath(
            tuple(
                (slot, SlotSpec(mode, rank, scale) if mode in RANKED_MODES else SlotSpec(mode))
                for slot, mode in zip(SLOTS, modes, strict=True)
                if mode != "none"
            )
        )
        for modes in itertools.product(*choices)
    ]
