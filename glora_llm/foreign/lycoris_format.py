"""LyCORIS's GLoRA of linear layers as slots.

W0 + s (W0 A1 A2 + B1 B2) with a1 (I, r), a2 (r, I), b1 (O, r), b2 (r, I) and s = alpha / r (lycoris/modules/glora.py,
4.1): A as a product and B, both of mode lora. A bias stays as it is.
"""

import json

from torch import Tensor

from glora_llm.errors import UserError
from glora_llm.foreign.slots import Base, Foreign, LayerSlots, lora

PREFIX = "lycoris_"  # before the name of each layer, whose dots are written as underscores
FACTORS = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
WITHOUT_FORM = {
    "bm.weight": "Tucker factors are for convolutions",
    "dora_scale": "a magnitude is a function of the whole weight, which no slot is",
}


def is_lycoris(tensors: dict[str, Tensor]) -> bool:
    """Tell whether these are the tensors of a LyCORIS network, of any of its methods."""
    return any(key.startswith(PREFIX) for key in tensors)


def from_lycoris(tensors: dict[str, Tensor], metadata: dict[str, str], base: Base) -> Foreign:
    """Return LyCORIS's GLoRA as slots.

    Args:
        metadata: of the safetensors file.

    Raises:
        UserError: for another method of LyCORIS, or anything that has no exact form, with the layer and the reason.
    """
    _require_plain_scale(metadata)
    names = {PREFIX + name.replace(".", "_"): name for name in base.linears}
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        stem, _, part = key.partition(".")
        layers.setdefault(stem, {})[part] = tensor
    found: dict[str, LayerSlots] = {}
    for stem, parts in layers.items():
        if stem not in names:
            raise UserError(
                f"The base has no linear that LyCORIS would call '{stem}', which the file has. This is not the base "
                "that it was trained on, or the network also changed other layers than linears."
            )
        found[names[stem]] = _layer(names[stem], parts)
    return Foreign("GLoRA of LyCORIS", found, "product")


def _layer(name: str, parts: dict[str, Tensor]) -> LayerSlots:
    for key in parts:
        if key in WITHOUT_FORM:
            raise UserError(f"{name}: {key} has no form in GLoRA's slots: {WITHOUT_FORM[key]}.")
        if key not in (*FACTORS, "alpha", "scalar"):
            raise UserError(
                f"{name}: {key} is not of LyCORIS's GLoRA ({', '.join(FACTORS)}, alpha), and of LyCORIS only that is "
                "read."
            )
    missing = [key for key in (*FACTORS, "alpha") if key not in parts]
    if missing:
        raise UserError(f"{name}: {missing[0]} is missing.")
    a1, a2, b1, b2 = (parts[key] for key in FACTORS)
    if any(factor.dim() != 2 for factor in (a1, a2, b1, b2)) or a2.shape[0] != b2.shape[0]:
        raise UserError(f"{name}: its factors have shapes {[tuple(f.shape) for f in (a1, a2, b1, b2)]}: no linear's.")
    scale = float(parts["alpha"]) / a2.shape[0]
    if "scalar" in parts:
        scale *= float(parts["scalar"])
    return {"A": lora(a1, a2, scale), "B": lora(b1, b2, scale)}


def _require_plain_scale(metadata: dict[str, str]) -> None:
    """Refuse a file whose metadata say rsLoRA: its scale is not in the file, and LyCORIS itself loads it with another.

    Raises:
        UserError: when they do.
    """
    try:
        arguments = json.loads(metadata.get("ss_network_args", "{}"))
    except ValueError:
        return
    if isinstance(arguments, dict) and str(arguments.get("rs_lora", False)).lower() == "true":
        raise UserError(
            "The file was trained with rs_lora (scale alpha / sqrt(r)), and LyCORIS loads it with alpha / r. Save it "
            "with its factors scaled to alpha / r first."
        )
