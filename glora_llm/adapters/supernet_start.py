"""A trained LoRA, or GLoRA with slot B alone, as the start of slot B of a supernet: `adapter.weights`.

A supernet is zero at its start, and learns every slot at once. Begun with a trained B, its largest path is the model
that was trained, and the other slots learn what B has not.

Letters: O out_features, I in_features, r rank of what was trained, R largest rank of the supernet.
"""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glora_llm.adapters.inject import adapted_layers
from glora_llm.adapters.start import ADAPTER_WEIGHTS, saved_config
from glora_llm.errors import UserError
from glora_llm.glora.config import GLORA_LLM
from glora_llm.glora.path import PEFT_ROOT
from glora_llm.training.sharding import set_whole, whole_shape

# peft_type -> ends of the names of the two factors, (O, r) and (r, I)
FACTORS = {"LORA": (".lora_B.weight", ".lora_A.weight"), GLORA_LLM.value: (".slot_B.down", ".slot_B.up")}
# fields of PEFT's configuration by which a layer adds something else than one product at one scale, where they are set
OTHER = (
    *("use_dora", "rank_pattern", "alpha_pattern", "alora_invocation_tokens", "use_qalora", "use_bdlora"),
    *("arrow_config", "kasa_config", "monteclora_config"),
)
UP_NORM = math.sqrt(1 / 3)  # of a row of `up` as it is drawn, uniform in +-1 / sqrt(I)


def begins_with_b(config: Any, folder: Path) -> bool:
    """Tell whether an adapter folder holds no supernet, and is to be the start of one.

    Args:
        config: PEFT's, of the adapter that is to begin with the folder.
    """
    saved = saved_config(folder)
    if saved is None or config.peft_type != GLORA_LLM or config.supernet is None:
        return False
    return saved.get("peft_type") in FACTORS and not saved.get("supernet")


def load_b(model: Any, folder: Path) -> None:
    """Set slot B of a supernet to a trained one, so that the largest path computes the same; all processes together.

    Ranks at one scale (`adapter.scaling: alpha`) are turned so that each is the best approximation of its rank: with
    the singular value decomposition down up = U S V', the first columns of U S. Where each rank has its own scale
    (`even`), few columns stand for all, and they stay as they were trained.

    Raises:
        UserError: as `check_b`.
    """
    found, config, trained = check_b(model, folder), model.peft_config["default"], config_of(folder)
    layers: dict[str, Any] = {**adapted_layers(model)}
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        for name, (down_name, up_name) in found.items():
            owner, spec = layers[name].slot_B["default"], layers[name].path["default"]["B"]
            down, up = file.get_tensor(down_name).float(), file.get_tensor(up_name).float()
            down *= _scale(trained, name) / (spec.scale * layers[name].factor("default", "B", spec.mode))
            if config.scaling != "even":
                down, up = ordered(down, up)
            whole_down, whole_up = torch.zeros(whole_shape(owner.down)), owner.up.detach().float().cpu().clone()
            whole_down[:, : down.shape[1]], whole_up[: len(up)] = down, up
            set_whole(owner.down, whole_down)
            set_whole(owner.up, whole_up)


def ordered(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors (O, r) and (r, I) of the same product, the largest singular value first; `up` is of usual size."""
    q_down, r_down = torch.linalg.qr(down)
    q_up, r_up = torch.linalg.qr(up.t())
    u, sizes, v = torch.linalg.svd(r_down @ r_up.t())
    return (q_down @ u) * (sizes / UP_NORM), UP_NORM * (v @ q_up.t())


def check_b(model: Any, folder: Path) -> dict[str, tuple[str, str]]:
    """Check that a folder's B fits into a supernet; reads no weight, and needs none in the model.

    Returns:
        layer -> names of its two factors.

    Raises:
        UserError: for another slot, layer, shape or a larger rank, and for what has more than one product (OTHER).
    """
    saved, is_even = saved_config(folder) or {}, model.peft_config["default"].scaling == "even"
    special = [key for key in OTHER if saved.get(key)]
    if special:
        raise UserError(f"adapter.weights: {folder} has {special[0]}, and slot B of a supernet has nothing like it.")
    ends, layers, file = FACTORS[saved["peft_type"]], adapted_layers(model), folder / ADAPTER_WEIGHTS
    try:
        with safe_open(file, framework="pt") as stored:
            shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118 - no dict
    except SafetensorError as error:
        raise UserError(f"adapter.weights: {file} is no safetensors file: {error}.") from None
    other = next((name for name in shapes if not name.endswith(ends)), None)
    if other is not None:
        raise UserError(
            f"adapter.weights: {folder} has {other}, and a supernet begins with slot B alone: with LoRA, or GLoRA of "
            "adapter.slots={B: lora}."
        )
    names = {name.removesuffix(ends[0]).removeprefix(PEFT_ROOT): name for name in shapes if name.endswith(ends[0])}
    unknown = next((layer for layer in names if layer not in layers), None)
    if unknown is not None:
        raise UserError(
            f"adapter.weights: {folder} has B of {unknown}, which is none of the {len(layers)} layers of this "
            f"supernet, such as {next(iter(layers))}. Set adapter.targets to what it was trained with."
        )
    found = {layer: (down, down.removesuffix(ends[0]) + ends[1]) for layer, down in names.items()}
    for layer, (down, up) in found.items():
        _check_shapes(layers[layer], layer, (shapes[down], shapes.get(up, ())), is_even)
    return found


def _check_shapes(layer: Any, name: str, found: tuple[tuple[int, ...], tuple[int, ...]], is_even: bool) -> None:
    owner = layer.slot_B["default"]
    if not hasattr(owner, "down"):
        raise UserError("adapter.weights begins slot B, which has no mode lora here: add it to adapter.supernet.modes.")
    (rows, most), (_, columns) = whole_shape(owner.down), whole_shape(owner.up)
    rank = found[0][1] if len(found[0]) == 2 else 0
    if found != ((rows, rank), (rank, columns)):
        raise UserError(f"adapter.weights: B of {name} has shapes {found[0]} and {found[1]}; it is {rows} x {columns}.")
    if rank > most or (is_even and rank != most):
        why = ", whose ranks share columns in adapter.scaling even" if rank <= most else ""
        raise UserError(
            f"adapter.weights: B of {name} has rank {rank}, and the largest of this supernet is {most}{why}: set "
            f"adapter.supernet.ranks so that its largest is {rank}."
        )


def config_of(folder: Path) -> Any:
    """Return the PEFT configuration of an adapter folder."""
    from peft import PeftConfig

    return PeftConfig.from_pretrained(str(folder))


def _scale(config: Any, name: str) -> float:
    """Return what multiplies the product of the two factors of a layer."""
    if config.peft_type != GLORA_LLM:
        return float(config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r))
    factors = (config.scales or {}).get(name, {}).get("B", {})
    return float(config.path_of(name)["B"].scale * factors.get("lora", 1.0))
