"""Tell the part of a model from the name of a trained tensor alone: slot, kind of module, layer."""

import re

from glora_llm.schema.slots import SIZED_PARTS

SLOT = re.compile(r"\.slot_([A-E])\.|\.(lora_[A-Za-z_]+|ia3_l|vera_lambda_[bd])(?:\.|$)")
PARTS = r"slot_[A-E]|ia3_l|(?:lora|vera|bottleneck|fusion|ssf|repadapter|vpt|noah)_\w+|modules_to_save|base_layer"
ADAPTER_PART = re.compile(rf"\.({PARTS})(\.|$)")
PROMPT = "prompt_encoder"  # of a prompt method: one part of the model, whatever modules it is made of
LAYER = re.compile(r"\.(\d+)\.")


def slot_of(name: str) -> str:
    """Return A to E of GLoRA, a part of NOAH's, a factor of LoRA, or `weights` of what is trained as it is."""
    if ".noah_parts." in name:
        part = name.rpartition(".")[2]
        return next((slot for slot, parts in SIZED_PARTS.items() if part in parts), "weights")
    found = SLOT.search(name)
    return (found[1] or found[2]) if found else "weights"


def kind_of_module(name: str) -> str:
    """Return the name of the module, such as `q_proj`."""
    owner = owner_of(name)
    parts = [part for part in owner.split(".") if not part.isdigit()]  # a whole block: the name of its list
    return parts[-1] if parts else owner


def owner_of(name: str) -> str:
    """Return the module that a tensor is trained in, such as `model.layers.0.self_attn.q_proj`."""
    if name.startswith(f"{PROMPT}."):
        return PROMPT
    part = ADAPTER_PART.search(name)
    return name[: part.start()] if part else name.rpartition(".")[0]


def layer_of(name: str) -> str:
    """Return the number of the layer, or `other`."""
    layer = None if name.startswith(f"{PROMPT}.") else LAYER.search(f".{name}")
    return layer[1] if layer else "other"


def in_order(by_layer: dict[str, int]) -> dict[str, int]:
    """Return counts by layer in the order of the layers; `other` is the last."""
    order = sorted(by_layer, key=lambda key: (not key.isdigit(), int(key) if key.isdigit() else 0))
    return {key: by_layer[key] for key in order}
