"""Check that an adapter can be merged into nf4 without a change of any 4-bit code."""

from collections.abc import Mapping
from typing import Any

from glora_llm.models.matrices import is_transposed
from glora_llm.schema import Recipe
from glora_llm.schema.slots import BLOCK

NAMED = 3  # layers that a message lists
HOW = (
    "Train with adapter.preset=lossless4 on model.quantization=nf4; or merge with quantize nf4, which quantises the "
    "merged weights again and measures what that costs."
)


def find_losses(recipe: Recipe, layers: Mapping[str, Any]) -> str | None:
    """Return why a merge into nf4 has to quantise again; None: no 4-bit code changes.

    Codes stay where slot A multiplies rows or blocks of W0 (modes vector, scalar, block) and B is none; C, D and E are
    biases of their own. Mode vector needs rows of whole blocks: 64 divides I.

    Args:
        layers: the adapted linears of the body (GLoRALinear), by name; other methods' are not looked at.
    """
    section = recipe.model
    if section.quantization != "nf4":
        return f"the base was trained in model.quantization {section.quantization}, so there are no nf4 codes to keep"
    if recipe.adapter.method != "glora":
        return f"adapter.method {recipe.adapter.method} adds a matrix to W0, which changes codes"
    transposed = [name for name, layer in layers.items() if is_transposed(layer.get_base_layer())]
    if transposed:
        return f"{transposed[0]} is a Conv1D, whose files hold the transpose of what is quantised"
    found = {}
    for name, layer in layers.items():
        path = layer.path["default"]
        slots = path.lossy_slots()
        if path["A"].mode == "vector" and layer.in_features % BLOCK:
            slots = ["A", *slots]
        if slots:
            found[name] = ", ".join(f"{slot} {path[slot].mode}" for slot in slots)
    if not found:
        return None
    first = "; ".join(f"{name}: {slots}" for name, slots in list(found.items())[:NAMED])
    more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"slots of {len(found)} layers change more of W0 than the scales of its blocks ({first}{more})"


def refuse_losses(losses: str) -> str:
    """Return the message to a recipe or a command that asks for nf4_lossless where something would be lost."""
    return f"merge.quantize is nf4_lossless, and {losses}. {HOW}"
