"""PEFT's LoRA, HiRA, IA3 and GLoRA as slots; each mapping is exact, and what has none is refused.

Formulas of PEFT 0.21 (peft/tuners/NAME/layer.py), W0 (O, I) and b0 (O) frozen:

- LoRA: W0 + s B A, s = alpha / r or alpha / sqrt(r); with `lora_bias` also b0 + s b.   Slots B lora, E vector.
- HiRA: W0 + W0 * (B A), element by element.                                            Slot A lora, hadamard.
- IA3 on outputs: l * (W0 x + b0).                                                      Slots A and D vector, l - 1.
- IA3 on inputs (feed-forward): W0 (l * x) + b0 = (W0 + W0 * (1 (l - 1)')) x + b0.       Slot A lora, hadamard, rank 1.
- GLoRA: W0 + W0 * A + B, and where there is a bias b0 + b0 * D + E + W0 C.             The same slots, hadamard.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from glora_llm.errors import UserError
from glora_llm.foreign.slots import Base, Foreign, LayerSlots, lora, scalar, vector
from glora_llm.glora.path import PEFT_ROOT

Parts = dict[str, Tensor]  # the tensors of one layer, by what stands behind its name: lora_A.weight
Config = dict[str, Any]

# Keys of adapter_config.json that change nothing of what an adapter computes once it is trained, or that are read here.
KNOWN_KEYS = {
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "init_weights", "init_ia3_weights", "feedforward_modules", "hira_dropout"),
    *("r", "rank_pattern", "config_A_B", "config_C", "config_D_E"),
    *("lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "lora_bias", "init_lora_weights", "eva_config"),
    *("runtime_config", "ephemeral_gpu_offload"),
}
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # of LoRA; every other one rewrites the base


def from_peft(config: Config, tensors: dict[str, Tensor], base: Base) -> Foreign:
    """Return a PEFT adapter as slots.

    Args:
        config: the content of adapter_config.json.
        tensors: of adapter_model.safetensors.

    Raises:
        UserError: for another method, or for anything that has no exact form in GLoRA, with the layer and the reason.
    """
    kind = config.get("peft_type")
    if kind not in READERS:
        hint = ""
        if kind == "GLORA_LLM":
            hint = " It is GLoRA of this program already: adapter.weights takes the folder."
        raise UserError(f"peft_type '{kind}' is not read. Read are of PEFT: {', '.join(sorted(READERS))}.{hint}")
    _require_plain(config)
    layers, rest = _by_layer(tensors, base)
    found: dict[str, LayerSlots] = {}
    for name, parts in layers.items():
        try:
            found[name] = READERS[kind](config, name, parts, base.linear(name))
        except KeyError as error:
            raise UserError(f"{name}: {error.args[0]} is missing beside {next(iter(parts))}.") from None
    if not found:
        raise UserError("The adapter has no adapted layer.")
    saved_modules = list(config.get("modules_to_save") or [])
    saved = {key: tensor.float() for key, tensor in rest.items() if _is_of(key, saved_modules)}
    has_a_lora = any(slots["A"].spec.mode == "lora" for slots in found.values() if "A" in slots)
    return Foreign(
        f"{kind} of PEFT",
        found,
        "hadamard" if has_a_lora else None,
        saved_modules,
        saved,
        {key.replace(".base_layer.", "."): tensor for key, tensor in rest.items() if key not in saved},
        config.get("base_model_name_or_path"),
    )


def _is_of(key: str, modules: list[str]) -> bool:
    """Tell whether a tensor belongs to one of modules_to_save, by PEFT's rule: `norm` is also input_layernorm."""
    return key.rpartition(".")[0].endswith(tuple(modules))


def _require_plain(config: Config) -> None:
    """Check that nothing in a configuration changes the method's formula, or the base.

    Raises:
        UserError: naming the key.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    fields = dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]])  # type: ignore[arg-type]
    defaults = {field.name: field.default for field in fields}
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise UserError(
            f"init_lora_weights is {start!r}: that start changes the base, so that the adapter is of another base than "
            "--base. Save it as a plain LoRA first, by path_initial_model_for_weight_conversion of PEFT's "
            "save_pretrained."
        )
    for key, value in config.items():
        if key in KNOWN_KEYS or not value or value == defaults.get(key):
            continue
        raise UserError(f"adapter_config.json has {key}={value!r}, which has no exact form in GLoRA's slots.")


def _by_layer(tensors: dict[str, Tensor], base: Base) -> tuple[dict[str, Parts], Parts]:
    """Return the tensors of adapted layers by layer, and all others, by their names in the base."""
    layers: dict[str, Parts] = {}
    rest: Parts = {}
    for full, tensor in tensors.items():
        key = full.removeprefix(PEFT_ROOT)
        at = next((key.find(mark) for mark in (".lora_", ".hira_", ".ia3_", ".glora_") if mark in key), -1)
        if at < 0:
            rest[key] = tensor
        else:
            layers.setdefault(key[:at], {})[key[at + 1 :]] = tensor
    return layers, rest


def _require_parts(name: str, parts: Parts, known: tuple[str, ...]) -> None:
    for key in parts:
        if key.startswith("lora_magnitude_vector"):
            raise UserError(f"{name}: a DoRA's magnitude is a function of the whole weight, which no slot is.")
        if key not in known:
            raise UserError(f"{name}: {key} has no form in GLoRA's slots; known here: {', '.join(known)}.")


def _lora(config: Config, name: str, parts: Parts, linear: nn.Linear) -> LayerSlots:
    from peft.utils.other import get_pattern_key

    _require_parts(name, parts, ("lora_A.weight", "lora_B.weight", "lora_B.bias"))
    up, down = parts["lora_A.weight"], parts["lora_B.weight"]
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(list(ranks), name), config["r"])
    if up.shape[0] != rank:
        raise UserError(f"{name}: lora_A has rank {up.shape[0]}, and adapter_config.json gives it {rank}.")
    alpha = alphas.get(get_pattern_key(list(alphas), name), config["lora_alpha"])
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    slots: LayerSlots = {"B": lora(down, up, scale)}
    if "lora_B.bias" in parts:
        slots["E"] = vector(_exact(parts["lora_B.bias"]) * scale)
    return slots


def _hira(config: Config, name: str, parts: Parts, linear: nn.Linear) -> LayerSlots:
    _require_parts(name, parts, ("hira_A", "hira_B"))
    return {"A": lora(parts["hira_B"], parts["hira_A"])}


def _ia3(config: Config, name: str, parts: Parts, linear: nn.Linear) -> LayerSlots:
    _require_parts(name, parts, ("ia3_l",))
    gains = _exact(parts["ia3_l"]) - 1
    if gains.shape == (1, linear.in_features):
        return {"A": lora(torch.ones(linear.out_features, 1), gains)}
    if gains.shape != (linear.out_features, 1):
        raise UserError(
            f"{name}: ia3_l has shape {tuple(gains.shape)}; the base's layer needs ({linear.out_features}, 1), or "
            f"(1, {linear.in_features}) as a feed-forward module. This is not the base that it was trained on."
        )
    slots = {"A": vector(gains)}
    return slots if linear.bias is None else slots | {"D": vector(gains)}


def _glora(config: Config, name: str, parts: Parts, linear: nn.Linear) -> LayerSlots:
    slots: LayerSlots = {}
    for slot in "ABCDE":
        own = {key.partition(".")[2]: t for key, t in parts.items() if key.startswith(f"glora_{slot}.")}
        if "Xd" in own:
            slots[slot] = lora(own["Xd"], own["Xu"])
        elif "X" in own:
            is_scalar = own["X"].shape == (1,) and config["config_D_E" if slot in "DE" else "config_A_B"] == "constant"
            slots[slot] = scalar(own["X"]) if is_scalar and slot != "C" else vector(own["X"])
        elif own.keys() - {"zeros"}:
            raise UserError(f"{name}: glora_{slot}.{next(iter(own))} has no form in GLoRA's slots.")
    if linear.bias is None and slots.keys() & set("CDE"):
        raise UserError(
            f"{name}: the adapter shifts this layer's bias, and in the base it has none. This is not the base that the "
            "adapter was trained on."
        )
    return slots


def _exact(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, so that what is computed from it is rounded once."""
    return tensor.double()


Reader = Callable[[Config, str, Parts, nn.Linear], LayerSlots]
READERS: dict[str, Reader] = {"GLORA": _glora, "HIRA": _hira, "IA3": _ia3, "LORA": _lora}
