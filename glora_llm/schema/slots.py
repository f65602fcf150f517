"""The words of GLoRA's slots (arXiv 2306.07967, section 3): slots, their modes, presets and compositions."""

from typing import Literal, get_args

Slot = Literal["A", "B", "C", "D", "E"]
Mode = Literal["lora", "vector", "scalar", "none"]
Preset = Literal["lora", "ssf", "repadapter", "bitfit", "ia3_like", "hira"]
Composition = Literal["product", "hadamard"]  # of A in mode lora: W0 (A_d A_u), or W0 * (A_d A_u)

SLOTS: tuple[str, ...] = get_args(Slot)
COMPOSITIONS: tuple[str, ...] = get_args(Composition)

# The modes of each slot. A supernet allocates their parameters, and a search chooses among them.
SLOT_MODES: dict[str, tuple[str, ...]] = {
    "A": ("lora", "vector", "scalar", "none"),
    "B": ("lora", "vector", "scalar", "none"),
    "C": ("lora", "vector", "none"),
    "D": ("vector", "scalar", "none"),
    "E": ("vector", "scalar", "none"),
}
DEFAULT_SLOTS: dict[str, str] = {"A": "lora", "B": "lora", "C": "vector", "D": "none", "E": "vector"}

# The systems that GLoRA generalises. A preset sets the composition too where the system depends on it.
PRESETS: dict[str, dict[str, str]] = {
    "lora": {"B": "lora"},
    "bitfit": {"E": "vector"},
    "ssf": {"A": "vector", "D": "vector", "E": "vector"},
    "repadapter": {"A": "lora", "C": "vector"},
    "ia3_like": {"A": "vector"},
    "hira": {"A": "lora"},
}
PRESET_COMPOSITION = {"repadapter": "product", "hira": "hadamard"}
