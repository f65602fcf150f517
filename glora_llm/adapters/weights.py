"""List, load and save the trained weights of an adapter."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glora_llm.adapters.adalora import kept_ranks, pruned_shape, spread
from glora_llm.adapters.even_start import start_gains
from glora_llm.adapters.frozen import is_frozen, load_frozen
from glora_llm.adapters.fused import FrozenAdapters
from glora_llm.adapters.methods import METHODS, check_loraplus
from glora_llm.adapters.periodic_lora import PeriodicLora, past_factors
from glora_llm.adapters.saved_prompts import SAVED, learns_prompt, saved_prompt, saved_prompt_names
from glora_llm.adapters.start import ADAPTER_WEIGHTS, require_same_function, require_weights, saved_config
from glora_llm.adapters.supernet_start import begins_with_b, check_b, load_b
from glora_llm.errors import UserError
from glora_llm.glora.learning_rates import lr_factors
from glora_llm.schema import AdapterSection
from glora_llm.training import checkpoint
from glora_llm.training.optim import Trainable
from glora_llm.training.sharding import set_whole, whole_shape


def trainables(model: nn.Module, section: AdapterSection, loraplus_ratio: float) -> list[Trainable]:
    """Return the trained parameters by name, with the factor on the learning rate of each.

    Args:
        loraplus_ratio: of the learning rate of the up factors, those that end in the layer's outputs, to that of the
            others (LoRA+, arXiv 2402.12354).

    Raises:
        UserError: for a ratio where no parameter is such a factor.
    """
    factors = dict(lr_factors(model, dict(section.lr_factors or {}), loraplus_ratio, section.scaling == "even"))
    up_names = METHODS[section.method].up if section.method in METHODS else ()
    found = [name for name, p in model.named_parameters() if p.requires_grad]
    ups = {name for name in found if any(f".{up}." in f"{name}." for up in up_names)}
    if loraplus_ratio != 1 and section.method != "glora" and not ups:
        check_loraplus(section, loraplus_ratio)
        raise UserError(
            f"training.loraplus_ratio is {loraplus_ratio:g}, and no layer of this model has a second factor with "
            f"adapter.method {section.method} and adapter.rank {section.rank}: set training.loraplus_ratio=1."
        )
    group = section.method if section.method == PeriodicLora.name else ""  # Adam's count of A and B begins anew
    return [
        Trainable(
            name,
            parameter,
            loraplus_ratio if name in ups else factors.get(id(parameter), 1.0),
            group if ".lora_" in name else "",
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def load_start(model: Any, items: list[Trainable], folder: Path) -> None:
    """Set the trained parameters to the weights of an adapter folder of the same slots; all processes call it together.

    Ranks that AdaLoRA had pruned begin as zero again, so the function is the same. A supernet may begin with a trained
    B instead (`supernet_start`).

    Args:
        model: the PEFT model that `inject` returned.

    Raises:
        UserError: as `check_weights`.
    """
    check_weights(model, items, folder)
    if begins_with_b(model.peft_config["default"], folder):
        return load_b(model, folder)
    weights, names = load_file(folder / ADAPTER_WEIGHTS), _saved_names(model, items)
    gains = start_gains(model, (saved_config(folder) or {}).get("scales"), list(names.values()))
    for item in items:
        name, pruned = names[item.name], _pruned(folder).get(names[item.name])
        whole = weights[name] if pruned is None else spread(weights[name], pruned, item.parameter.detach(), name)
        set_whole(item.parameter, whole if gains.get(name, 1.0) == 1 else gains[name] * whole)
    load_frozen(model, folder)


def check_weights(model: Any, items: list[Trainable], folder: Path) -> None:
    """Check that an adapter folder holds what `items` can begin with; reads no weight, and needs none in the model.

    Raises:
        UserError: when the folder is damaged or of another configuration, or a weight is missing, left over, or of
            another shape.
    """
    require_weights(folder)
    problem = adapter_fault(folder)
    if problem:
        raise UserError(f"adapter.weights: {folder} is damaged: {problem}.")
    if begins_with_b(model.peft_config["default"], folder):
        check_b(model, folder)
        return
    require_same_function(model.peft_config["default"], folder)
    names = _saved_names(model, items)
    given_by_encoder = {SAVED} if _has_prompt(model) and SAVED not in names.values() else set()
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            stored = set(file.keys()) - given_by_encoder
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in stored}
    except SafetensorError as error:
        raise UserError(f"adapter.weights: {folder / ADAPTER_WEIGHTS} is no safetensors file: {error}.") from None
    patterns = _pruned(folder)
    for item in items:
        name = names[item.name]
        expected, got = tuple(whole_shape(item.parameter)), shapes.pop(name, None)
        if name in patterns:
            expected = pruned_shape(expected, patterns[name], name)
        if got != expected:
            what = "is missing" if got is None else f"has shape {got}"
            raise UserError(f"adapter.weights: {name} {what} in {folder}; expected {expected}.")
    for name, tensor in frozen_tensors(model, saved=True).items():
        if shapes.pop(name, None) != tuple(tensor.shape):
            raise UserError(f"adapter.weights: {name} is missing in {folder}, or of another shape.")
    left = [name for name in shapes if not is_frozen(name)]
    if left:
        raise UserError(f"adapter.weights: {folder} has {left[0]}, which this adapter has not.")


def _pruned(folder: Path) -> dict[str, list[bool]]:
    """Return, of each factor of an AdaLoRA adapter whose ranks were pruned, which ranks were kept."""
    config = saved_config(folder) or {}
    pattern = config.get("rank_pattern") if config.get("peft_type") == "ADALORA" else None  # LoRA's says something else
    return kept_ranks(pattern or {})


def _saved_names(model: Any, items: list[Trainable]) -> dict[str, str]:
    """Return by the name of each trained parameter the one under which PEFT saves it; each method has its own rule."""
    from peft import get_peft_model_state_dict

    state = {item.name: item.parameter for item in items}
    with _prompt_given(model, torch.empty(0)):
        saved = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    name_of = {id(parameter): name for name, parameter in saved.items()}
    names = {item.name: name_of.get(id(item.parameter), item.name) for item in items}
    return names | saved_prompt_names(list(state)) if _has_prompt(model) else names


def frozen_tensors(model: Any, saved: bool = False) -> dict[str, Tensor]:
    """Return what an adapter holds beside its trained parameters and is saved with it: the adapters of a fusion.

    Args:
        saved: by the names that PEFT saves them under; else by those in the model.
    """
    owners = {name: module for name, module in model.named_modules() if isinstance(module, FrozenAdapters)}
    found = {f"{name}.{key}": buffer for name, module in owners.items() for key, buffer in module.named_buffers()}
    if not saved or not found:
        return found
    from peft import get_peft_model_state_dict

    renamed: dict[str, Tensor] = get_peft_model_state_dict(model, state_dict=found, save_embedding_layers=False)
    return renamed


def require_same_frozen(model: Any, folder: Path) -> None:
    """Check that a fusion goes on with the adapters that it began with.

    Args:
        folder: the adapter of a checkpoint.

    Raises:
        UserError: when the weights in adapter.peft.adapters are others.
    """
    digests = getattr(getattr(model, "peft_config", {}).get("default"), "digests", None)
    if digests is not None and digests != (saved_config(folder) or {}).get("digests"):
        raise UserError(
            f"adapter.peft.adapters: these are not the adapters that {folder} was trained with. Put those back, or "
            "choose another output.dir."
        )


def adapter_fault(folder: Path) -> str | None:
    """Return what is wrong with the files of an adapter folder; None: nothing, or no manifest of them was written."""
    return checkpoint.fault(folder, {ADAPTER_WEIGHTS}) if (folder / checkpoint.MANIFEST).is_file() else None


def save_adapter(model: Any, tensors: dict[str, Tensor], folder: Path, base_name: str) -> None:
    """Write a PEFT adapter folder from float32 master weights (`master/NAME` -> tensor)."""
    weights = {name.removeprefix("master/"): t for name, t in tensors.items() if name.startswith("master/")}
    weights |= {name: tensor.float().cpu() for name, tensor in frozen_tensors(model).items()}
    weights |= past_factors(model)
    for config in model.peft_config.values():
        config.base_model_name_or_path = base_name
    prompt = saved_prompt(model, weights) if _has_prompt(model) else {}
    with _prompt_given(model, prompt.get(SAVED)):
        model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    if len(prompt) > 1:
        file = folder / ADAPTER_WEIGHTS
        save_file({name: t.contiguous() for name, t in (load_file(file) | prompt).items()}, file, {"format": "pt"})
    (folder / "README.md").unlink(missing_ok=True)


def _has_prompt(model: Any) -> bool:
    return learns_prompt(model.peft_config["default"])


@contextmanager
def _prompt_given(model: Any, prompt: Tensor | None) -> Iterator[None]:
    """Let PEFT save this prompt, and not compute one from weights that other processes hold parts of."""
    if prompt is None or not _has_prompt(model):
        yield
        return
    model.get_prompt_embedding_to_save = lambda adapter_name: prompt
    try:
        yield
    finally:
        del model.get_prompt_embedding_to_save
