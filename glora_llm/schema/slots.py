"""The words of GLoRA's slots (arXiv 2306.07967, section 3): slots, their modes, presets and compositions."""

from typing import Literal, get_args

Slot = Literal["A", "B", "C", "D", "E"]
Mode = Literal["lora", "block", "vector", "scalar", "none"]
Preset = Literal["lora", "ssf", "repadapter", "bitfit", "ia3_like", "hira", "lossless4"]
Composition = Literal["product", "hadamard"]  # of A in mode lora: W0 (A_d A_u), or W0 * (A_d A_u)

SLOTS: tuple[str, ...] = get_args(Slot)
COMPOSITIONS: tuple[str, ...] = get_args(Composition)

# The modes of each slot.
SLOT_MODES: dict[str, tuple[str, ...]] = {
    "A": ("lora", "block", "vector", "scalar", "none"),
    "B": ("lora", "vector", "scalar", "none"),
    "C": ("lora", "vector", "none"),
    "D": ("vector", "scalar", "none"),
    "E": ("vector", "scalar", "none"),
}
# What a supernet allocates, and a search chooses among, where a recipe does not say: the modes of the paper. Mode block
# has to be named, because not every layer can have it.
SUPERNET_MODES: dict[str, tuple[str, ...]] = {
    slot: tuple(mode for mode in modes if mode != "block") for slot, modes in SLOT_MODES.items()
}
RANKED_MODES = ("lora", "block")  # two thin factors: these have a rank, and are scaled by alpha / rank
# Slots of a block in NOAH (arXiv 2206.04673) -> the mode of each, whose rank is its size: units of the adapter's hidden
# layer, rank of LoRA, prompts. Size 0 is mode none.
SIZED_SLOTS: dict[str, str] = {"adapter": "bottleneck", "lora": "lora", "prompt": "tokens"}
# Its parameters by slot -> the dimension along which a smaller size is the first entries; None: whole in every size.
SIZED_PARTS: dict[str, dict[str, int | None]] = {
    "adapter": {"down": 0, "down_bias": 0, "up": 1, "up_bias": None},
    "lora": {"query_down": 0, "query_up": 1, "value_down": 0, "value_up": 1},
    "prompt": {"prompt": 0},
}
NOAH_SIZES = [100, 50, 10, 5, 0]  # what a search chooses among, where a recipe does not say
SIZED_MODES = tuple(dict.fromkeys((*RANKED_MODES, *SIZED_SLOTS.values())))
BLOCK = 64  # values of a row of W0 that have one gain in mode block: those that share a scale in a 4-bit weight
# Modes that change nothing of a 4-bit weight but the scales of its blocks, or that are a bias of their own.
LOSSLESS_MODES: dict[str, tuple[str, ...]] = SLOT_MODES | {"A": ("block", "vector", "scalar", "none"), "B": ("none",)}
DEFAULT_SLOTS: dict[str, str] = {"A": "lora", "B": "lora", "C": "vector", "D": "none", "E": "vector"}

# The systems that GLoRA generalises. A preset sets the composition too where the system depends on it.
PRESETS: dict[str, dict[str, str]] = {
    "lora": {"B": "lora"},
    "bitfit": {"E": "vector"},
    "ssf": {"A": "vector", "D": "vector", "E": "vector"},
    "repadapter": {"A": "lora", "C": "vector"},
    "ia3_like": {"A": "vector"},
    "hira": {"A": "lora"},
    "lossless4": {"A": "block", "C": "vector", "E": "vector"},
}
PRESET_COMPOSITION = {"repadapter": "product", "hira": "hadamard"}
