"""The recipe's adapter section -> a PEFT model, and what of it is trained at which rate."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from glora_llm.errors import UserError, nearest
from glora_llm.glora import GLoRAConfig, GLoRALinear
from glora_llm.glora.learning_rates import lr_factors
from glora_llm.glora.path import (
    DEFAULT_SLOTS,
    PEFT_ROOT,
    PRESET_COMPOSITION,
    PRESETS,
    Genome,
    genome_from_json,
    genome_to_slots,
)
from glora_llm.glora.supernet import require_known
from glora_llm.schema import AdapterSection, SlotSetting, SupernetSection
from glora_llm.training.optim import Trainable

# Methods that are LoRA with one switch.
LORA_VARIANTS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def adapter_config(section: AdapterSection, seed: int, steps: int, classifier: nn.Module | None = None) -> Any:
    """Return the PEFT config of the section.

    Args:
        steps: optimizer steps of the run; AdaLoRA spreads its budget over them.
        classifier: an image classifier; None: the model is a causal language model. PEFT knows no such task: the head
            is kept out of all-linear here, and trained in full unless adapter.modules_to_save says otherwise.

    Raises:
        UserError: for an unknown method, or an argument that its config does not have.
    """
    shared: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "target_modules": section.targets,
        "modules_to_save": section.modules_to_save,
    }
    if classifier is not None:
        saved = ["classifier"] if section.modules_to_save is None else section.modules_to_save
        shared |= {"task_type": None, "modules_to_save": saved}
        if section.targets == "all-linear":
            shared["target_modules"] = _linear_suffixes(classifier.base_model)  # type: ignore[arg-type]
    if section.method == "glora":
        slots = dict(PRESETS[section.preset]) if section.preset else _plain(section.slots or DEFAULT_SLOTS)
        return GLoRAConfig(
            slots=slots,
            paths={pattern: _plain(path) for pattern, path in _patterns(section).items()},
            genome=None if section.genome is None else genome_to_slots(read_genome(Path(section.genome))),
            supernet=(section.supernet or SupernetSection()).model_dump() if section.is_supernet else None,
            rank=section.rank,
            alpha=section.alpha,
            rank_stabilized=section.rank_stabilized,
            composition=PRESET_COMPOSITION.get(section.preset or "", section.composition),
            dropout=section.dropout,
            d_without_bias="none" if section.preset else "error",
            seed=seed,
            **shared,
        )
    return _peft_config(section, shared, steps)


def _patterns(section: AdapterSection) -> Mapping[str, Any]:
    return section.paths if isinstance(section.paths, dict) else {}


def read_genome(file: Path) -> Genome:
    """Read a genome file.

    Raises:
        UserError: when it is not there, or names unknown slots or modes.
    """
    if not file.is_file():
        raise UserError(f"There is no genome file {file}; a search writes RUN/genome.json.")
    return genome_from_json(file.read_text())


def _plain(slots: Any) -> dict[str, Any]:
    return {
        slot: given.model_dump(exclude_none=True) if isinstance(given, SlotSetting) else given
        for slot, given in slots.items()
    }


def _peft_config(section: AdapterSection, shared: dict[str, Any], steps: int) -> Any:
    from peft import LoraConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if section.method in LORA_VARIANTS:
        config_class: Any = LoraConfig
        wanted = dict(LORA_VARIANTS[section.method])
    else:
        known = {kind.value.lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        known.pop("glora_llm", None)  # ours, and its section is method glora
        if section.method not in known:
            names = sorted({"full", "glora", *LORA_VARIANTS, *known})
            raise UserError(
                f"adapter.method '{section.method}' is unknown.{nearest(section.method, names)} "
                f"There is: {', '.join(names)}."
            )
        config_class, wanted = known[section.method], {}
    fields = {item.name for item in dataclasses.fields(config_class)}
    wanted |= {"r": section.rank, "lora_alpha": section.alpha, "lora_dropout": section.dropout}
    if section.method == "adalora":
        wanted |= {"target_r": section.rank, "init_r": round(1.5 * section.rank), "total_step": steps}
        wanted |= {"tinit": steps // 10, "tfinal": steps // 5, "deltaT": max(1, steps // 100)}
    if section.rank_stabilized:
        wanted["use_rslora"] = True
    values = {name: value for name, value in (shared | wanted).items() if name in fields} | (section.peft or {})
    unknown = [name for name in values if name not in fields]
    if unknown:
        raise UserError(
            f"adapter.peft.{unknown[0]}: {config_class.__name__} has no such argument.{nearest(unknown[0], fields)}"
        )
    return config_class(**values)


def inject(base: nn.Module, section: AdapterSection, seed: int, steps: int) -> Any:
    """Return the base as a PeftModel whose only trainable parameters are the adapter's; method full: itself, trained.

    Raises:
        UserError: when no module matches the targets (candidates are listed), or the method rejects the model.
    """
    if section.is_full:
        return base.requires_grad_(True)
    from peft import get_peft_model

    torch.manual_seed(seed)
    try:
        is_language_model = hasattr(base, "prepare_inputs_for_generation")
        config = adapter_config(section, seed, steps, None if is_language_model else base)
        if config.is_prompt_learning:
            raise UserError(
                f"adapter.method {section.method} learns a prompt; only methods that adapt modules train here."
            )
        model = get_peft_model(base, config)
    except (ValueError, TypeError) as error:
        if "target modules" not in str(error).lower():
            raise UserError(f"adapter.method {section.method}: {error}") from error
        raise UserError(f"adapter.targets {section.targets!r} match no module. {candidates(base)}") from error
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(
            f"adapter.method {section.method} has no trainable parameter. adapter.slots replaces the default slots as "
            "a whole: give every slot that is to be trained."
        )
    _require_matches(model, section)
    return model


def without_adapter(model: Any) -> Any:
    """Return the transformers model inside of what `inject` returned; its layers still hold the adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _require_matches(model: nn.Module, section: AdapterSection) -> None:
    """Check that every pattern of adapter.paths matches a layer."""
    names = list(adapted_layers(model))
    if section.genome is not None:
        require_known(read_genome(Path(section.genome)), names)
    for pattern in _patterns(section):
        if not any(re.search(pattern, name) for name in names):
            raise UserError(
                f"adapter.paths '{pattern}' matches none of the {len(names)} adapted layers, such as {names[0]}."
            )


def candidates(base: nn.Module) -> str:
    """Return a sentence that lists the last name parts of the model's linears."""
    names = _linear_suffixes(base)
    return f"Linears of this model: {', '.join(names)}; or all-linear."


def _linear_suffixes(model: nn.Module) -> list[str]:
    """Return the last parts of the names of all linears."""
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})


def trainables(model: nn.Module, section: AdapterSection, loraplus_ratio: float) -> list[Trainable]:
    """Return what is trained, by name, with the factor on the learning rate of each."""
    factors = dict(lr_factors(model, dict(section.lr_factors or {}), loraplus_ratio)) | _loraplus(model, loraplus_ratio)
    return [
        Trainable(name, parameter, factors.get(id(parameter), 1.0))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def _loraplus(model: nn.Module, ratio: float) -> dict[int, float]:
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return {id(p): ratio for layer in layers for p in layer.lora_B.parameters()}


def load_start(items: list[Trainable], folder: Path) -> None:
    """Set what is trained to the weights of an adapter folder of the same slots.

    Raises:
        UserError: when a weight is missing, left over, or of another shape.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"adapter.weights: {folder} holds no adapter_model.safetensors.")
    weights = load_file(file)
    for item in items:
        name = item.name.replace(".modules_to_save.default", "").replace(".default", "")  # as PEFT saves it
        weight = weights.pop(name, None)
        if weight is None or weight.shape != item.parameter.shape:
            got = "is missing" if weight is None else f"has shape {tuple(weight.shape)}"
            raise UserError(f"adapter.weights: {name} {got} in {folder}; expected {tuple(item.parameter.shape)}.")
        item.parameter.data.copy_(weight)
    if weights:
        raise UserError(f"adapter.weights: {folder} has {next(iter(weights))}, which this adapter has not.")


def save_adapter(model: Any, tensors: dict[str, Tensor], folder: Path, base_name: str) -> None:
    """Write a PEFT adapter folder from float32 master weights (`master/NAME` -> tensor)."""
    weights = {name.removeprefix("master/"): t for name, t in tensors.items() if name.startswith("master/")}
    for config in model.peft_config.values():
        config.base_model_name_or_path = base_name
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def adapted_layers(model: nn.Module) -> dict[str, GLoRALinear]:
    """Return the GLoRA layers of a PEFT model by their names in the base model."""
    return {
        name.removeprefix(PEFT_ROOT): module
        for name, module in model.named_modules()
        if isinstance(module, GLoRALinear)
    }


def adapted_with_bias(model: nn.Module) -> list[str]:
    """Return the names of the layers whose merged form needs a bias (C or E is active)."""
    return [
        name
        for name, layer in adapted_layers(model).items()
        if any(path.touches_bias() for path in layer.path.values())
    ]
