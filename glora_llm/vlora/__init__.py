"""Vertical LoRA (VLoRA, arXiv 2406.09315): k layers share one base, each next one adds a low-rank increment.

    W_1 = W_base;   W_l = W_(l-1) + s B_l A_l   for l = 2..k

`make_compounds` turns a model of like layers into it, `from_dense` keeps its weights as truncated increments, and
`to_dense` writes a plain model out again.
"""

from glora_llm.vlora.choose import choose_groups, require_budget
from glora_llm.vlora.compound import make_compounds
from glora_llm.vlora.config import VLoRAConfig
from glora_llm.vlora.convert import Increment, IncrementFit, from_dense, increments, m_steps, to_dense
from glora_llm.vlora.count import Count, allocated, matrix_count, parameter_count
from glora_llm.vlora.groups import Calibration, UnequalSharing, groups_from_dense, make_groups
from glora_llm.vlora.layer import Composition, VLoRALinear, compositions, vlora_layers
from glora_llm.vlora.weight import Added, Parts, accumulate, compose

__all__ = [
    "Added",
    "Calibration",
    "Composition",
    "Count",
    "Increment",
    "IncrementFit",
    "Parts",
    "UnequalSharing",
    "VLoRAConfig",
    "VLoRALinear",
    "accumulate",
    "allocated",
    "choose_groups",
    "compose",
    "compositions",
    "from_dense",
    "groups_from_dense",
    "increments",
    "m_steps",
    "make_compounds",
    "make_groups",
    "matrix_count",
    "parameter_count",
    "require_budget",
    "to_dense",
    "vlora_layers",
]
