"""An adapter folder as the start of a run: what can be said of it before any library is loaded."""

import json
from enum import Enum
from pathlib import Path
from typing import Any

from glora_llm.adapters.methods import refused_start
from glora_llm.errors import UserError

ADAPTER_WEIGHTS = "adapter_model.safetensors"  # as PEFT names it
ADAPTER_CONFIG = "adapter_config.json"
# Fields of a PEFT configuration that do not say what function the weights are: names and shapes of weights are compared
# by themselves, and the rest is about how it is trained, made or saved.
OF_NO_FUNCTION = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("runtime_config", "task_type", "adapters"),
    *("exclude_modules", "feedforward_modules", "layers_pattern", "layers_to_transform", "modules_to_save"),
    *("target_modules", "rank_pattern", "supernet", "d_without_bias", "scales"),
    *("ensemble", "ensemble_seed", "momentum", "p", "period"),
    *("corda_config", "eva_config", "init_ia3_weights", "init_lora_weights", "init_weights", "lora_ga_config", "seed"),
    *("beta1", "beta2", "deltaT", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step"),  # AdaLoRA's schedule
}
# names of recipe keys, where the configuration's own name is another
RECIPE_KEYS = {
    **dict.fromkeys(["alpha", "lora_alpha"], "adapter.alpha"),
    **dict.fromkeys(["init_r", "r", "rank"], "adapter.rank"),
    **dict.fromkeys(["peft_type", "use_dora", "use_rslora"], "adapter.method"),
    **{name: f"adapter.{name}" for name in ("composition", "paths", "rank_stabilized", "scaling", "slots")},
}
OF_SLOTS = ("slots", "paths", "genome", "rank", "alpha", "rank_stabilized")


def require_weights(folder: Path, key: str = "adapter.weights") -> None:
    """Check that a folder holds the weights of an adapter, trained on a base that is not rewritten.

    Args:
        key: of the recipe that names the folder.

    Raises:
        UserError: saying what is there in their place.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        inside = folder / "adapter"
        hint = f" Did you mean {inside}?" if (inside / ADAPTER_WEIGHTS).is_file() else ""
        if (folder / "adapter_model.bin").is_file():
            hint = " adapter_model.bin is a pickle, which is not read: load it by PEFT and save it again."
        what = "is no folder" if not folder.is_dir() else f"holds no {ADAPTER_WEIGHTS}"
        raise UserError(f"{key}: {folder} {what}.{hint}")
    start = (saved_config(folder) or {}).get("init_lora_weights")
    reason = refused_start(start)
    if reason and start not in ("eva", "mica"):  # of eva, all of it is saved; of mica, the missing factor is named
        raise UserError(
            f"{key}: {folder} began with init_lora_weights {start}: {reason}. Save it by PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...), as a difference to the original base."
        )


def require_same_base(folder: Path, fingerprint: str, key: str = "adapter.weights", headless: bool = False) -> None:
    """Check that an adapter folder inside of a run was trained on the base of this run.

    Args:
        folder: RUN/adapter or RUN/checkpoints/step-N/adapter; of others it is not known which base they are of.
        fingerprint: of this run's base; empty where its weights are not on this machine yet.
        key: of the recipe that names the folder.
        headless: of the models before they got a new head, where they did.

    Raises:
        UserError: naming the base that the weights belong to.
    """
    places = [place / "base.json" for place in folder.absolute().parents[:3]]
    file = next((place for place in places if place.is_file()), None)
    base = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
    found = (base.get("headless") if headless else None) or base.get("fingerprint", fingerprint)
    if fingerprint and found != fingerprint:
        raise UserError(
            f"{key}: {folder} was trained on {base.get('name')}, and this recipe has another base: they "
            "would be another function. Set model.name_or_path to that base (its weights may have changed since)."
        )


def saved_config(folder: Path, key: str = "adapter.weights") -> dict[str, Any] | None:
    """Return the PEFT configuration beside the weights, or None where there is none.

    Args:
        key: of the recipe that names the folder.

    Raises:
        UserError: when it is no JSON object.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {file} is not valid JSON: {error}.") from None
    if not isinstance(found, dict):
        raise UserError(f"{key}: {file} holds no JSON object.")
    return found


def require_same_function(config: Any, folder: Path) -> None:
    """Check that weights mean the same under a configuration as under the one that they were saved with.

    Args:
        config: PEFT's, of the adapter that is to begin with the weights.

    Raises:
        UserError: naming the first field that differs. Another scale, say, would begin with another function.
    """
    saved = saved_config(folder)
    if saved is None:
        return
    here = {name: _plain(value) for name, value in config.to_dict().items()}
    if here.get("peft_type") != saved.get("peft_type"):
        raise _differs(folder, "peft_type", saved.get("peft_type"), here.get("peft_type"))
    if "scaling" in here:
        saved.setdefault("scaling", "alpha")  # an adapter of a release without the other one
    left_out = OF_NO_FUNCTION | (set(OF_SLOTS) if here.get("genome") is not None else set())
    for name in sorted(here.keys() & saved.keys() - left_out):
        if "dropout" not in name and here[name] != _plain(saved[name]):
            raise _differs(folder, name, saved[name], here[name])


def _differs(folder: Path, name: str, there: Any, here: Any) -> UserError:
    key = RECIPE_KEYS.get(name, f"adapter.peft.{name}")
    return UserError(
        f"adapter.weights: {folder} was trained with {name} {there}, and this recipe has {here}: the weights would be "
        f"another function. Set {key} to what it was trained with."
    )


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back: sets in order, and slots of mode none left out."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value), key=str)
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items() if item != "none"}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | None) else str(value)
