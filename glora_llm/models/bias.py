"""The linears and convolutions of a family that can carry a bias: found by building one layer, not by a list."""

import copy
from typing import TYPE_CHECKING, Literal

from glora_llm.errors import UserError, nearest
from glora_llm.models.families import auto_class, body

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BiasSupport = Literal["has", "switch", "never"]


def bias_support(config: "PretrainedConfig", suffix: str) -> BiasSupport:
    """Say whether linears whose name ends in `suffix` (`q_proj`, `down_proj`) can have a bias in this family.

    `has`: always; `switch`: when a key of config.json says so (see `bias_switch`); `never`.

    Raises:
        UserError: when the family has no such linear.
    """
    without, with_all = _biases(config, {}), _biases(config, dict.fromkeys(_switches(config), True))
    if suffix not in without:
        raise UserError(
            f"Model type '{config.model_type}' has no linear '{suffix}'; there is: {', '.join(sorted(without))}."
            f"{nearest(suffix, without)}"
        )
    if not with_all[suffix]:
        return "never"
    return "has" if without[suffix] else "switch"


def bias_switch(config: "PretrainedConfig", suffix: str) -> str | None:
    """Return the key of config.json that alone gives `suffix` a bias, or None where no single key does."""
    if bias_support(config, suffix) != "switch":
        return None
    return next((key for key in _switches(config) if _biases(config, {key: True})[suffix]), None)


def suffixes_with_bias(config: "PretrainedConfig") -> set[str]:
    """Return the last name parts of the linears that have a bias under this very configuration."""
    return {suffix for suffix, there in _biases(config, _settings(config)).items() if there}


def _settings(config: "PretrainedConfig") -> dict[str, bool]:
    text = config.get_text_config(decoder=True)
    return {key: bool(getattr(text, key)) for key in _switches(config)}


def _switches(config: "PretrainedConfig") -> list[str]:
    """Return the boolean keys of the configuration that speak of a bias (attention_bias, mlp_bias, use_bias ...)."""
    text = config.get_text_config(decoder=True)
    return sorted(key for key, value in text.to_dict().items() if isinstance(value, bool) and "bias" in key)


def _biases(config: "PretrainedConfig", on: dict[str, bool]) -> dict[str, bool]:
    """Build one layer on the meta device with the switches in `on`, all others off: last part of the name -> bias."""
    import torch

    from glora_llm.models.matrices import CONVOLUTIONS, LINEARS

    twin = copy.deepcopy(config)
    text = twin.get_text_config(decoder=True)
    for key in _switches(config):
        setattr(text, key, on.get(key, False))
    text.num_hidden_layers = 1
    follows = isinstance(getattr(type(text), "layer_types", None), property)  # from the number of layers, in a Mamba
    if getattr(text, "layer_types", None) and not follows:
        text.layer_types = text.layer_types[:1]
    with torch.device("meta"):
        layer = body(auto_class(twin).from_config(twin))
    found: dict[str, bool] = {}
    for name, module in layer.named_modules():
        if isinstance(module, LINEARS + CONVOLUTIONS):
            last = name.rpartition(".")[2]
            found[last] = found.get(last, True) and module.bias is not None
    return found


def linears_with_bias(kind: type["PreTrainedModel"], config: "PretrainedConfig") -> set[str]:
    """Return the full names of the linears that have a bias in a model of class `kind` with this configuration."""
    import torch

    from glora_llm.models.matrices import CONVOLUTIONS, LINEARS

    with torch.device("meta"):
        model = kind._from_config(copy.deepcopy(config))
    kinds = LINEARS + CONVOLUTIONS
    return {name for name, module in model.named_modules() if isinstance(module, kinds) and module.bias is not None}


def switch_biases_on(kind: type["PreTrainedModel"], config: "PretrainedConfig", wanted: set[str]) -> set[str]:
    """Set the keys of `config` that give the linears `wanted` (full names) a bias.

    Returns:
        the full names of all linears that have a bias then; what is wanted and not among them, the family cannot hold.
    """
    found = linears_with_bias(kind, config)
    text = config.get_text_config(decoder=True)
    for key in _switches(config):
        if getattr(text, key) or wanted <= found:
            continue
        setattr(text, key, True)
        with_key = linears_with_bias(kind, config)
        if (with_key - found) & wanted:
            found = with_key
        else:
            setattr(text, key, False)
    return found
