"""A learning-rate factor for each slot, so that LoRA's usual rate is as stable for GLoRA."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from glora_llm.glora.layer import GLoRALinear
from glora_llm.schema.slots import SLOTS

# Measured: docs/benchmarks/frontier.md.
DEFAULT_LR_FACTORS: dict[str, float] = {"A": 0.5, "B": 1.0, "C": 0.1, "D": 0.1, "E": 0.1}
BLOCK_LR_FACTOR = 1.0  # of A in mode block. Measured: docs/benchmarks/lossless4.md.


def lr_factors(
    model: nn.Module, given: Mapping[Any, float], loraplus_ratio: float, even: bool = False
) -> Iterator[tuple[int, float]]:
    """Yield (id of a parameter, factor on the learning rate) of all GLoRA parameters of a model.

    Args:
        given: factors by slot that replace the defaults.
        even: the scales of the slots make one rate right for all: the defaults are 1.
        loraplus_ratio: further factor on the zero-initialised factor of mode lora (LoRA+, arXiv 2402.12354).
    """
    factors = (dict.fromkeys(SLOTS, 1.0) if even else DEFAULT_LR_FACTORS) | dict(given)
    for layer in model.modules():
        if not isinstance(layer, GLoRALinear):
            continue
        for slot in SLOTS:
            for mode in getattr(layer, f"slot_{slot}").modules():
                for name, parameter in mode.named_parameters(recurse=False):
                    zero_start = name.endswith("down") or (even and name in ("vector", "scalar"))
                    in_blocks = name.startswith("block") and slot not in given
                    factor = BLOCK_LR_FACTOR if in_blocks else factors[slot]
                    yield id(parameter), factor * (loraplus_ratio if zero_start else 1.0)
