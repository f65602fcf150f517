"""Fit an adapter to what serves it: the slots that would be dropped there, left out, and what that costs."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from glora_llm.adapters.inject import adapted_layers, adapted_with_bias, added_biases
from glora_llm.errors import CheckFailed, UserError
from glora_llm.glora.layer import GLoRALinear
from glora_llm.merge.choices import LLAMA_CPP, MergeChoices
from glora_llm.merge.layers import AdapterLayers
from glora_llm.merge.leaving_out import LeftOut, in_words, slots_of, smaller_adapter
from glora_llm.merge.reference import Reference, reference_of
from glora_llm.merge.targets import family_of, is_served, source
from glora_llm.merge.verify import MergeReport, compare
from glora_llm.models.bias import suffixes_with_bias
from glora_llm.models.gguf_writing import require_gguf
from glora_llm.models.load import meta_model
from glora_llm.plan.plan import Plan
from glora_llm.plan.run_folder import RunFolder

BIAS_SLOTS = {"C", "E"}  # what makes a bias where the base has none


@dataclass(frozen=True)
class Fitted:
    """An adapter that is ready to be merged or exported.

    Attributes:
        plan: of the adapter that is written.
        trained: its folder; or that of a model that was trained as a whole.
        reference: the answers that its merged form is compared with, where they are there already.
        without: part of the report: what was left out, and what that costs; None: nothing was.
    """

    plan: Plan
    trained: Path
    reference: Reference | None = None
    without: dict[str, Any] | None = None

    def report(self) -> dict[str, Any]:
        """Return the part of merge_report.json about what was left out."""
        return {} if self.without is None else {"without": self.without}


@contextlib.contextmanager
def fitted(
    plan: Plan, folder: RunFolder, trained: Path, base_dtype: torch.dtype, chosen: MergeChoices
) -> Iterator[Fitted]:
    """Give what is to be written for a target (`--for`) and without some slots (`--without`).

    With a target, slots are left out of those layers alone in which the target would drop them.

    Args:
        trained: folder of the adapter, or of the model that was trained as a whole.
        base_dtype: what the unmerged model computes in.

    Raises:
        UserError: when the target would drop something that is not to be left out, with what that would cost; or there
            is nothing to leave out.
        CheckFailed: when leaving out costs more than its bound.
    """
    if chosen.target is None and not chosen.without:
        yield Fitted(plan, trained)
        return
    if plan.recipe.adapter.is_full:
        if chosen.without:
            raise UserError("--without leaves slots of a GLoRA adapter out, and this run trained a whole model.")
        _require_family(chosen.target, meta_model(plan.recipe.model, trained).config, trained)
        yield Fitted(plan, trained)
        return
    adapter = AdapterLayers(plan.recipe, plan.base.folder, trained, plan.steps)
    layers, config = adapted_layers(adapter.model), adapter.model.get_base_model().config
    asked = _require_slots(set(chosen.without), layers)
    if chosen.target is None:
        left_out = {name: slots & asked for name, slots in slots_of(layers).items() if slots & asked}
    else:
        _require_family(chosen.target, config, plan.base.folder)
        _require_served(chosen.target, config, adapter.model)
        dropped = _dropped(chosen.target, config, adapter.model, layers)
        missing = {name: slots for name, slots in dropped.items() if slots - asked}
        if missing:
            measured = _measured(plan, folder, trained, base_dtype, layers, dropped) if chosen.compared else None
            raise UserError(_refusal(chosen.target, plan, config, layers, dropped, measured))
        left_out = dropped
    if not left_out:
        what = "all slots of this adapter" if layers else "all of this adapter"
        print(f"{chosen.target} serves {what}{': nothing is left out' if asked else ''}.")
        yield Fitted(plan, trained)
        return
    with smaller_adapter(plan, layers, trained, left_out) as (smaller, place):
        yield _with_cost(Fitted(smaller, place), plan, folder, trained, base_dtype, chosen, left_out)


def _require_slots(asked: set[str], layers: dict[str, GLoRALinear]) -> set[str]:
    there = set().union(*slots_of(layers).values()) if layers else set()
    absent = asked - there
    if absent:
        have = in_words(there) if there else "no slot of GLoRA at all"
        raise UserError(f"--without {','.join(sorted(asked))}: this adapter has no {in_words(absent)}; it has {have}.")
    return asked


def _require_family(target: str | None, config: Any, tokenizer: Path) -> None:
    """Check that a target has the family, and gives the base the biases that it has itself.

    Args:
        tokenizer: folder of the tokenizer.
    """
    assert target is not None
    family_of(target, config.model_type)
    if target == LLAMA_CPP:
        require_gguf(config, tokenizer)
    own = sorted(kind for kind in suffixes_with_bias(config) if not is_served(target, config, kind))
    if own:
        raise UserError(
            f"--for {target}: the base itself has biases on {', '.join(own)}, which {target} drops "
            f"({source(target, config.model_type)}). Nothing was written."
        )


def _require_served(target: str, config: Any, model: Any) -> None:
    """Check that a target has the biases that merged adapters of a method without slots give to linears."""
    added = {name.rpartition(".")[2]: remedy for name, remedy in added_biases(model).items()}
    lost = sorted(kind for kind in added if not is_served(target, config, kind))
    if lost:
        raise UserError(
            f"--for {target}: the adapter gives a bias to {', '.join(lost)}, which {target} drops "
            f"({source(target, config.model_type)}). Nothing was written. Train with "
            f"adapter.peft={{{added[lost[0]]}}}, or merge without --for."
        )


def _dropped(target: str, config: Any, model: Any, layers: dict[str, GLoRALinear]) -> dict[str, set[str]]:
    """Return the layers whose bias the target drops, with the slots that make it."""
    kinds = {name.rpartition(".")[2] for name in adapted_with_bias(model)}
    lost = {kind for kind in kinds if not is_served(target, config, kind)}
    slots = slots_of({name: layer for name, layer in layers.items() if name.rpartition(".")[2] in lost})
    return {name: given & BIAS_SLOTS for name, given in slots.items() if given & BIAS_SLOTS}


def _measured(
    plan: Plan,
    folder: RunFolder,
    trained: Path,
    base_dtype: torch.dtype,
    layers: dict[str, GLoRALinear],
    left_out: LeftOut,
) -> MergeReport | None:
    """Return what leaving slots out costs; None where nothing would be left of the adapter."""
    if not any(slots - left_out.get(name, set()) for name, slots in slots_of(layers).items()):
        return None
    with smaller_adapter(plan, layers, trained, left_out) as (smaller, place):
        before = reference_of(plan, folder, trained, base_dtype)
        after = reference_of(smaller, folder, place, base_dtype)
    return compare(before.answers, after.answers, before.text)


def _with_cost(
    fit: Fitted,
    plan: Plan,
    folder: RunFolder,
    trained: Path,
    base_dtype: torch.dtype,
    chosen: MergeChoices,
    left_out: LeftOut,
) -> Fitted:
    """Add what leaving slots out costs, against the whole adapter, and check it against its bound."""
    report: dict[str, Any] = {"left_out": {name: sorted(slots) for name, slots in sorted(left_out.items())}}
    if not chosen.compared:
        return replace(fit, without=report | {"compared": False})
    before = reference_of(plan, folder, trained, base_dtype)
    after = reference_of(fit.plan, folder, fit.trained, base_dtype)
    cost = compare(before.answers, after.answers, before.text)
    slots: set[str] = set().union(*left_out.values())
    print(f"left out: {in_words(slots)} of {len(left_out)} layers, which changes {_in_numbers(cost)}", flush=True)
    bound = plan.recipe.merge.max_loss_change if chosen.max_loss_change is None else chosen.max_loss_change
    if not cost.loss_after - cost.loss_before <= bound:
        named = "merge.max_loss_change" if chosen.max_loss_change is None else "--max-loss-change"
        raise CheckFailed(
            f"Without {in_words(slots)} of {len(left_out)} layers the loss rises by "
            f"{cost.loss_after - cost.loss_before:.4f}, more than {named} {bound}: {_in_numbers(cost)}. Nothing was "
            "written. Train without these slots, or name the rise that you accept: --max-loss-change NATS."
        )
    return replace(fit, reference=after, without=report | cost.as_dict())


def _in_numbers(cost: MergeReport) -> str:
    return (
        f"the loss from {cost.loss_before:.4f} to {cost.loss_after:.4f} nats/token and {1 - cost.top1_agreement:.1%} "
        f"of the most likely tokens ({cost.text})"
    )


def _refusal(
    target: str,
    plan: Plan,
    config: Any,
    layers: dict[str, GLoRALinear],
    dropped: dict[str, set[str]],
    cost: MergeReport | None,
) -> str:
    """Return why nothing was written, what leaving out costs, and what to do."""
    kinds = sorted({name.rpartition(".")[2] for name in dropped})
    slots: set[str] = set().union(*dropped.values())
    names = ",".join(sorted(slots))
    measured = (
        "What leaving them out costs was not measured."
        if cost is None
        else f"Leaving them out changes {_in_numbers(cost)}."
    )
    return (
        f"{target} gives {', '.join(kinds)} of a {config.model_type} model no bias "
        f"({source(target, config.model_type)}): {in_words(slots)} of {len(dropped)} of {len(layers)} layers would be "
        f"dropped, the first {next(iter(dropped))}. {measured} Nothing was written. To write the model without them "
        f"there, add --without {names}. To train so that it fits: {_how_to_train(plan, layers, dropped, kinds, slots)}."
    )


def _how_to_train(
    plan: Plan, layers: dict[str, GLoRALinear], dropped: dict[str, set[str]], kinds: list[str], slots: set[str]
) -> str:
    """Return the settings of a recipe under which nothing would be dropped."""
    section = plan.recipe.adapter
    if section.genome is not None:
        modes = ", ".join(f"{slot}: [none]" for slot in sorted(slots))
        return f"search a supernet without them, adapter.supernet='{{modes: {{{modes}}}}}'"
    path = layers[next(iter(dropped))].path["default"]
    kept = {slot: spec.mode for slot, spec in path.active() if slot not in slots}
    if not kept:
        return "choose other slots than these, such as adapter.slots='{A: lora, B: lora}'"
    said = "{" + ", ".join(f"{slot}: {mode}" for slot, mode in kept.items()) + "}"
    bias_layers = {name for name, given in slots_of(layers).items() if given & BIAS_SLOTS}
    everywhere = bias_layers == set(dropped)
    return f"adapter.slots='{said}'" if everywhere else f"adapter.paths='{{{'|'.join(kinds)}: {said}}}'"
