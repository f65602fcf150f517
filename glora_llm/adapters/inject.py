"""Inject the adapter of a recipe into a base model."""

import contextlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from glora_llm.adapters.adalora import AdaLoRA, freeze_rank_numbers
from glora_llm.adapters.budgeted import settle
from glora_llm.adapters.config import adapter_config, linear_suffixes, path_patterns, read_genome
from glora_llm.adapters.methods import LINEAR_ALONE
from glora_llm.adapters.noah import NoahLayer
from glora_llm.adapters.peft_arguments import no_effect_is_an_error
from glora_llm.adapters.places import is_layer_norm, layer_norm_names
from glora_llm.adapters.prompt_arguments import PROMPT_METHODS
from glora_llm.adapters.prompts import accept_prompt, install_prompt
from glora_llm.adapters.targets import name_linears, require_names
from glora_llm.adapters.tuner import ModuleLayer
from glora_llm.errors import UserError
from glora_llm.glora import GLoRALinear
from glora_llm.glora.path import PEFT_ROOT, Genome
from glora_llm.glora.supernet import SearchedLayer, require_known
from glora_llm.schema import AdapterSection

FROZEN_TENSORS = ("delora_w_norm", "pvera_A", "pvera_B", "vera_A", "vera_B")  # buffers of PEFT's layers


def inject(base: nn.Module, section: AdapterSection, seed: int, steps: int, genome: Genome | None = None) -> Any:
    """Return the base as a PeftModel that trains the adapter alone, or for method full the base itself, trained.

    Args:
        steps: optimizer steps of the run.
        genome: the content of adapter.genome, or what was chosen within adapter.budget; None: it is read here, if the
            section names one, and a budget is spent evenly (on a model without weights).

    Raises:
        UserError: when no module matches the targets (candidates are listed), or the method rejects the model.
    """
    if section.is_full:
        return base.requires_grad_(True)
    from peft import get_peft_model

    if section.method == "ln_tuning" and section.targets == "all-linear":
        section = section.model_copy(update={"targets": layer_norm_names(base)})

    if genome is None and section.genome is not None:
        genome = read_genome(Path(section.genome))
    check_linears(section, base)
    torch.manual_seed(seed)
    modules, linears = [name for name, _ in base.named_modules()], linear_suffixes(base)
    try:
        is_language_model = hasattr(base, "prepare_inputs_for_generation")
        config = adapter_config(section, seed, steps, None if is_language_model else base, genome)
        is_prompt = section.method in PROMPT_METHODS
        accepting = accept_prompt(base, section.method) if is_prompt else contextlib.nullcontext()
        with no_effect_is_an_error(section.peft or {}), accepting:
            model = get_peft_model(base, config)
        if is_prompt:
            install_prompt(model)
    except UserError:
        raise
    except (ValueError, TypeError, NotImplementedError, OSError) as error:  # OSError: no tokenizer of that name
        if isinstance(error, TypeError) and section.peft:
            raise UserError(f"adapter.peft {section.peft} holds a value of another type: {error}.") from error
        if "target modules" not in str(error).lower():
            raise UserError(f"adapter.method {section.method}: {error}") from error
        raise UserError(f"adapter.targets {section.targets!r} match no module. {name_linears(linears)}") from error
    if section.method == AdaLoRA.name:
        freeze_rank_numbers(model)
    require_names(section, modules, linears)
    _require_matches(model, section, genome)
    if section.method == "ln_tuning":
        _require_norms(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"adapter.method {section.method} has no trainable parameter. {_why_none(section, genome)}")
    return model


def _why_none(section: AdapterSection, genome: Genome | None) -> str:
    if genome is not None:
        return "The genome gives no layer a slot."
    if section.method != "glora":
        return "Look what adapter.peft and adapter.targets leave to be trained."
    return "adapter.slots replaces the default slots as a whole: give every slot that is to be trained."


def without_adapter(model: Any) -> Any:
    """Return the transformers model inside of what `inject` returned; its layers still hold the adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _require_matches(model: nn.Module, section: AdapterSection, genome: Genome | None) -> None:
    """Check that every layer of a genome, and every pattern of adapter.paths, is of the model; spend a budget."""
    if section.budget is not None and genome is None:
        settle(model, adapted_layers(model), section)
    names = list(searched_layers(model))
    if genome is not None:
        require_known(genome, names)
    for pattern in path_patterns(section):
        if not any(re.search(pattern, name) for name in names):
            raise UserError(
                f"adapter.paths '{pattern}' matches none of the {len(names)} adapted layers, such as {names[0]}."
            )


def check_linears(section: AdapterSection, base: nn.Module) -> None:
    """Check that a method takes the linears of a model: of transformers' Conv1D (GPT-2) not all do.

    Raises:
        UserError: naming a linear.
    """
    is_concerned = section.method in LINEAR_ALONE and section.targets == "all-linear"
    named = base.named_modules() if is_concerned else ()
    transposed = next((name for name, module in named if isinstance(module, Conv1D)), None)
    if transposed is not None:
        raise UserError(
            f"adapter.method {section.method} does not train this model: {transposed} is a Conv1D, a linear whose "
            "weight is transposed, which PEFT does not adapt by it. Take another: glora, lora, dora, ia3, houlsby, ssf."
        )


def _require_norms(model: nn.Module) -> None:
    """Check that LN tuning, which trains whole copies of its targets, has norms alone."""
    for name, layer in tuner_layers(model).items():
        target = layer.get_base_layer()
        if not is_layer_norm(target):
            raise UserError(
                f"adapter.method ln_tuning trains layer norms, and {name} is a {type(target).__name__}. "
                "Name norms in adapter.targets, or leave adapter.targets=all-linear: all of them are trained then."
            )


def match_frozen_tensors(model: nn.Module) -> None:
    """Give the frozen tensors of DeLoRA, VeRA and PVeRA the dtype of what they train: their layers multiply the two.

    DeepSpeed trains in the dtype of the model above stage 0, and PEFT keeps these in float32.
    """
    for layer in tuner_layers(model).values():
        tensors = {name: tensor for name, tensor in layer.named_buffers() if name.startswith(FROZEN_TENSORS)}
        for tensor in tensors.values():
            tensor.data = tensor.data.to(next(each.dtype for each in layer.parameters() if each.requires_grad))


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that an adapter of any method is in, by their names in the base model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name.removeprefix(PEFT_ROOT): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def adapted_layers(model: nn.Module) -> dict[str, GLoRALinear]:
    """Return the GLoRA layers of a PEFT model by their names in the base model."""
    return {name: layer for name, layer in tuner_layers(model).items() if isinstance(layer, GLoRALinear)}


def searched_layers(model: nn.Module) -> dict[str, SearchedLayer]:
    """Return the layers that a genome gives a path, by their names in the base model: GLoRA's, or NOAH's blocks."""
    return {name: layer for name, layer in tuner_layers(model).items() if isinstance(layer, GLoRALinear | NoahLayer)}


def added_biases(model: nn.Module) -> dict[str, str]:
    """Return the linears without bias that get one when adapters of our other methods are merged.

    Returns:
        full name -> the argument of the method under which it would get none.
    """
    found = {}
    for name, layer in tuner_layers(model).items():
        if isinstance(layer, ModuleLayer):
            for inside in layer.added_biases():
                found[f"{name}.{inside}".rstrip(".")] = layer.without_biases
    return found


def adapted_with_bias(model: nn.Module) -> list[str]:
    """Return the names of the layers whose merged form needs a bias (C or E is active)."""
    return [
        name
        for name, layer in adapted_layers(model).items()
        if layer.merges_into_bias and any(path.touches_bias() for path in layer.path.values())
    ]
