"""The places of a method in a transformer block: attention and feed-forward modules, found by their names."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from glora_llm.errors import UserError
from glora_llm.models.families import HEADS
from glora_llm.training.sharding import whole_shape


@dataclass(frozen=True)
class Parts:
    """Names, inside a block, of the modules around its two residual sums.

    Attributes:
        family: models that have these names.
        attention_input: the module whose input goes into queries, keys and values, and nowhere else.
        attention_output: the module whose output is the attention's, before the residual sum.
        feed_forward_input: the module whose input goes into the first feed-forward linears, and nowhere else.
        feed_forward_output: the module whose output is the feed-forward network's, before the residual sum.
        readers: names, inside the input modules, of the linears that read that input; "" is the module itself.
    """

    family: str
    attention_input: str
    attention_output: str
    feed_forward_input: str
    feed_forward_output: str
    readers: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """True if one module holds the feed-forward network, from its input to its output."""
        return self.feed_forward_input == self.feed_forward_output

    def names(self) -> tuple[str, ...]:
        """Return the four modules' names."""
        return self.attention_input, self.attention_output, self.feed_forward_input, self.feed_forward_output


QKV, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
FAMILIES = (
    Parts(
        "LLaMA-like (Mistral, Qwen, Gemma, Phi-3, GLM, OLMo ...)",
        *("self_attn", "self_attn", "mlp", "mlp"),
        readers=(*QKV, "qkv_proj", *GATED, "gate_up_proj", "fc1", "c_fc"),
    ),
    Parts("GPT-2", "attn", "attn", "mlp", "mlp", readers=("c_attn", "c_fc", *QKV, "fc_in")),
    Parts("OPT", "self_attn", "self_attn", "fc1", "fc2", readers=(*QKV, "")),
    Parts(
        "ViT, GPT-NeoX",
        "attention",
        "attention",
        "mlp",
        "mlp",
        readers=(*QKV, "query_key_value", "fc1", "dense_h_to_4h"),
    ),
    Parts(
        "BERT, RoBERTa",
        *("attention.self", "attention.output.dense", "intermediate", "output.dense"),
        readers=("query", "key", "value", "dense"),
    ),
)


def blocks(model: nn.Module) -> dict[str, Parts]:
    """Return the blocks of a model by their full names, in order, and what their parts are called.

    A list of modules is one of blocks when all of them have the parts of one family.

    Raises:
        UserError: for a model that has no such list, naming the families that are known.
    """
    found: dict[str, Parts] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            parts = next((known for known in FAMILIES if all(_has(block, known) for block in module)), None)
            if parts is not None:
                found |= {f"{name}.{number}": parts for number in range(len(module))}
    if not found:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        known = "; ".join(parts.family for parts in FAMILIES)
        raise UserError(
            f"No blocks with attention and feed-forward modules of known names were found in a {kind} model. Known: "
            f"{known}. Take a method that adapts linears (glora, lora), or name the modules in adapter.targets."
        )
    return found


def outside_heads(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model by their full names, but for the output head and the parts of a classifier's."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        parts = name.split(".")
        if module is not output and parts[0] not in HEADS and "base_layer" not in parts:
            yield name, module


def is_norm(module: Any) -> bool:
    """Tell whether a module is a norm with a weight (O) of its own."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and weight is not None and len(whole_shape(weight)) == 1


def is_layer_norm(module: Any) -> bool:
    """Tell whether a module is a norm that computes each sample by itself, as a batch norm does not."""
    return is_norm(module) and not isinstance(module, nn.BatchNorm2d)


def layer_norm_names(model: Any) -> list[str]:
    """Return the full names of a model's layer norms (RMS norms too), but for those of heads.

    Raises:
        UserError: when it has none.
    """
    found = [name for name, module in outside_heads(model) if is_layer_norm(module)]
    if not found:
        raise UserError(f"adapter.method ln_tuning trains layer norms, and a {type(model).__name__} has none.")
    return found


def _has(block: nn.Module, parts: Parts) -> bool:
    for name in parts.names():
        try:
            block.get_submodule(name)
        except AttributeError:
            return False
    return True
