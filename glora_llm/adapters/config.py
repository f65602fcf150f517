"""Translate the recipe's adapter section into a PEFT configuration."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

import glora_llm.adapters.own  # noqa: F401 - registers its methods
from glora_llm.adapters.adalora import AdaLoRA, require_budget
from glora_llm.adapters.methods import METHODS, check_method
from glora_llm.adapters.peft_arguments import check_arguments, no_effect_is_an_error
from glora_llm.adapters.prompt_arguments import PROMPT_METHODS, check_prompt
from glora_llm.adapters.stateful import STATEFUL_METHODS
from glora_llm.errors import AdapterError, UserError
from glora_llm.glora import GLoRAConfig
from glora_llm.glora.path import Genome, genome_from_json, genome_to_slots
from glora_llm.models.families import head_names
from glora_llm.models.matrices import CONVOLUTIONS, is_linear
from glora_llm.schema import AdapterSection, SlotSetting, SupernetSection
from glora_llm.schema.slots import DEFAULT_SLOTS, PRESET_COMPOSITION, PRESETS

FACTOR_METHODS = ("lora_dropout", "lors", "periodic_lora")  # of our own, on PEFT's LoRA layers
# Methods that are LoRA with one switch.
LORA_VARIANTS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def reads_base(section: AdapterSection) -> bool:
    """Tell whether a method may look at the values of the base's weights when it is injected, and not only at shapes.

    Such a base must be whole on every process at that moment. Arguments of PEFT count, for they can switch to another
    start (init_lora_weights) or method (use_dora).
    """
    if section.method in METHODS and METHODS[section.method].places:  # methods of our own go by names and shapes
        return False
    if section.method in PROMPT_METHODS:
        return (section.peft or {}).get("prompt_tuning_init", "RANDOM") != "RANDOM"
    if section.method in FACTOR_METHODS:
        return False
    return section.method not in ("full", "glora", "lora", "rslora") or bool(section.peft)


def adapter_config(
    section: AdapterSection,
    seed: int,
    steps: int,
    classifier: nn.Module | None = None,
    genome: Genome | None = None,
) -> Any:
    """Return the PEFT config of the section.

    Args:
        steps: optimizer steps of the run; AdaLoRA spreads its budget over them.
        classifier: a classifier of images or texts; None: the model is a causal language model. The head is kept out of
            all-linear here, and trained in full unless adapter.modules_to_save says otherwise.
        genome: the content of adapter.genome.

    Raises:
        UserError: for a method that does not train here, or an argument that its config does not have.
    """
    shared: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "target_modules": section.targets,
        "modules_to_save": section.modules_to_save,
    }
    if classifier is not None:
        saved = head_names(classifier) if section.modules_to_save is None else section.modules_to_save
        shared |= {"task_type": None, "modules_to_save": saved}
        if section.targets == "all-linear" and not (section.method in METHODS and METHODS[section.method].places):
            shared["target_modules"] = _body_linears(classifier)
    if section.method == "glora":
        slots = dict(PRESETS[section.preset]) if section.preset else _plain(section.slots or DEFAULT_SLOTS)
        return GLoRAConfig(
            slots=slots,
            paths={pattern: _plain(path) for pattern, path in path_patterns(section).items()},
            genome=None if genome is None else genome_to_slots(genome),
            supernet=_supernet(section, {"modes", "ranks"}),
            rank=section.rank,
            alpha=section.alpha,
            rank_stabilized=section.rank_stabilized,
            scaling=section.scaling,
            composition=PRESET_COMPOSITION.get(section.preset or "", section.composition),
            dropout=section.dropout,
            d_without_bias="none" if section.preset else "error",
            seed=seed,
            **shared,
        )
    if section.method == "noah":
        shared |= {
            "genome": None if genome is None else genome_to_slots(genome),
            "supernet": _supernet(section, {"sizes"}),
        }
    if section.method == "periodic_lora":
        shared["seed"] = seed
    return _peft_config(section, shared, steps)


def _supernet(section: AdapterSection, keys: set[str]) -> dict[str, Any] | None:
    """Return what a supernet draws from; None where the structure is fixed."""
    return (section.supernet or SupernetSection()).model_dump(include=keys) if section.is_supernet else None


def path_patterns(section: AdapterSection) -> Mapping[str, Any]:
    """Return adapter.paths where it maps patterns of layer names to slots, else nothing."""
    return section.paths if isinstance(section.paths, dict) else {}


def read_genome(file: Path) -> Genome:
    """Read a genome file.

    Raises:
        UserError: when it is not there, or names unknown slots or modes.
    """
    if not file.is_file():
        raise UserError(f"There is no genome file {file}; a search writes RUN/genome.json.")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text: {error}; a search writes RUN/genome.json.") from error
    return genome_from_json(text)


def _plain(slots: Any) -> dict[str, Any]:
    return {
        slot: given.model_dump(exclude_none=True) if isinstance(given, SlotSetting) else given
        for slot, given in slots.items()
    }


def _peft_config(section: AdapterSection, shared: dict[str, Any], steps: int) -> Any:
    from peft import LoraConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    check_method(section)
    if section.method in LORA_VARIANTS:
        config_class: Any = LoraConfig
        wanted = dict(LORA_VARIANTS[section.method])
    else:
        known = {kind.value.lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        config_class, wanted = known[METHODS[section.method].tuner or section.method], {}
    fields = {item.name for item in dataclasses.fields(config_class)}
    wanted |= METHODS[section.method].arguments
    wanted |= {"r": section.rank, "lora_alpha": section.alpha, "lora_dropout": section.dropout}
    if METHODS[section.method].places:  # the names in configurations of our own
        wanted |= {"rank": section.rank, "alpha": section.alpha, "dropout": section.dropout}
    if section.method in STATEFUL_METHODS:
        wanted |= STATEFUL_METHODS[section.method].config_arguments(section, steps)
    if section.method == "ia3" and section.targets == "all-linear":
        wanted["feedforward_modules"] = []  # PEFT saves all-linear as full names, beside which it refuses to load these
    if section.rank_stabilized:
        wanted["use_rslora"] = True
    given = section.peft or {}
    check_arguments(config_class, given)
    if section.method in PROMPT_METHODS:
        check_prompt(section)
        if shared["task_type"] is None:  # PEFT names the task of every prompt, and trains the head itself
            shared = {"task_type": "SEQ_CLS", "modules_to_save": section.modules_to_save}
    values = {name: value for name, value in (shared | wanted).items() if name in fields} | given
    try:
        with no_effect_is_an_error(given):
            made = config_class(**values)
    except AdapterError as error:  # of a configuration of our own
        raise UserError(f"adapter.method {section.method}: {error}") from None
    if section.method == AdaLoRA.name:
        require_budget(made)
    return made


def _body_linears(classifier: nn.Module) -> list[str]:
    """Return what names the linears of a classifier's body: the last parts of their names.

    Where the head has such a part too (`dense` of RoBERTa), they are whole names.

    Raises:
        UserError: when there is none, naming convolutions.
    """
    heads, inside = head_names(classifier), cast(nn.Module, classifier.base_model)
    suffixes = linear_suffixes(inside)
    if not suffixes:
        names = sorted({n.rpartition(".")[2] for n, m in inside.named_modules() if isinstance(m, CONVOLUTIONS)})
        there = f": its convolutions are called {', '.join(names)}: adapter.targets=[{names[0]}]" if names else ""
        raise UserError(f"adapter.targets is all-linear, and the body of this model has no linear{there}.")
    if not set(suffixes) & {part for name in heads for part in linear_suffixes(classifier.get_submodule(name))}:
        return suffixes
    linears = [name for name, module in classifier.named_modules() if is_linear(module)]
    return [name for name in linears if name.partition(".")[0] not in heads]


def linear_suffixes(model: nn.Module) -> list[str]:
    """Return the last parts of the names of all linears."""
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if is_linear(module)})
