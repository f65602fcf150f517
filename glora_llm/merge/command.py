"""`glora-llm merge RUN --out DIR`: write, reload with plain transformers, compare, report."""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from glora_llm.atomic import require_new, whole_folder
from glora_llm.errors import CheckFailed, UserError
from glora_llm.evaluation.scoring import score_model
from glora_llm.evaluation.trained import fits, load_merged, weight_bytes, whole_model
from glora_llm.launch.device import choose_device
from glora_llm.merge.choices import MergeChoices
from glora_llm.merge.lora_export import write_lora
from glora_llm.merge.lossless import losses_of, merge_lossless
from glora_llm.merge.model_merge import write_merged
from glora_llm.merge.published import REPORT, exact_float32, published
from glora_llm.merge.sample import comparison_batches
from glora_llm.merge.verify import (
    Answers,
    adapted_model,
    advice,
    answers,
    compare,
    merged_model,
    require_within,
)
from glora_llm.merge.whole_model import write_dense
from glora_llm.models.load import load_base
from glora_llm.plan.elsewhere import recipe_for_merge, recipe_for_scores
from glora_llm.plan.genome import deployed
from glora_llm.plan.lossless import refuse_losses
from glora_llm.plan.plan import Plan, make_plan, require_same_base
from glora_llm.plan.run_folder import RunFolder
from glora_llm.plan.trained_weights import trained_weights
from glora_llm.schema import Recipe

# Parts of the report on an int8 run -> what each compares with the unmerged model of unpacked weights.
ROUNDED = {
    "int8": "for itself, the trained int8 model (its linears round their inputs)",
    "int8_exported": "for itself, the LoRA on the int8 base (all linears round their inputs)",
}


@dataclass(frozen=True)
class Reference:
    """The answers of the unmerged model, with which a result is compared.

    The linears of an int8 model round what they are given to 8 bits (those that GLoRA adapts do not). No merged model
    does, so the reference of an int8 run has the same unpacked weights in dense linears, and what rounding changes is
    reported by itself: it says nothing about the merge.

    Args:
        batches: the model's inputs.
        text: what they are in words.
        answers: of the unmerged model.
    """

    batches: list[Any]
    text: str
    answers: Answers


def merge_run(run: Path, out: Path, **choices: Any) -> None:
    """Merge or export what a run trained, verify it against the unmerged model, and write merge_report.json.

    The data of the run need not be here, but those of images.

    Args:
        run: the run folder.
        out: the folder to make.
        choices: fields of `MergeChoices`.

    Raises:
        UserError: when something does not fit; nothing is written then.
        CheckFailed: when the result differs from the unmerged model by more than the recipe's bounds.
    """
    chosen = MergeChoices(**choices)
    to = chosen.to
    folder = RunFolder(run)
    weights, checkpoint = trained_weights(folder, chosen.step)
    recipe, adapter = deployed(folder, weights, chosen.genome)
    is_full = recipe.adapter.is_full
    if is_full and to == "lora":
        raise UserError(f"--to lora exports GLoRA adapters, and {run} trained a whole model. Use --to model.")
    plan = make_plan(recipe_for_merge(folder, recipe))
    base_dtype = require_same_base(folder, plan)
    quantize = chosen.quantize or recipe.merge.quantize
    if to == "lora" and (chosen.dtype or quantize != "none"):
        raise UserError("--dtype and --quantize are for --to model; a LoRA is written in float32.")
    losses = "the whole model was trained" if is_full else losses_of(plan, adapter) if quantize != "none" else None
    if losses and quantize == "nf4_lossless":
        raise UserError(refuse_losses(losses))
    require_new(out)
    wanted = "float32" if to == "lora" else chosen.dtype or recipe.merge.dtype
    print(f"{'exporting' if to == 'lora' else 'merging'} {run} into {out}", flush=True)
    if quantize != "none" and not losses:
        with exact_float32():
            written = getattr(torch, chosen.dtype) if chosen.dtype else base_dtype
            merge_lossless(plan, folder, adapter, out, (base_dtype, written), chosen.compared)
        return
    with exact_float32(), whole_model(plan, folder.model, checkpoint) if is_full else nullcontext(adapter) as trained:
        with published(out) as working:
            if is_full:
                write_dense(plan, trained, working, wanted)
            elif to == "lora":
                write_lora(plan, trained, working, base_dtype)
            else:
                write_merged(plan, trained, working, base_dtype, wanted)
            reference = _reference(plan, folder, trained, base_dtype) if chosen.compared else None
            values = _verify(plan, reference, trained, working, base_dtype, wanted, to)
        _print(out, "the result", values, plan.task.scored)
        for name, title in ROUNDED.items():
            if name in values:
                _print(out, title, values[name], plan.task.scored)
        if quantize == "nf4":
            _requantise(plan, out, reference, values | {"not_lossless": losses})
    usual = chosen.is_usual and quantize == "none"
    if usual and out.resolve() == (run / "merged").resolve():
        _score_merged(folder, recipe, out)


def _reference(plan: Plan, folder: RunFolder, trained: Path, base_dtype: torch.dtype) -> Reference:
    batches, text = comparison_batches(plan, folder)
    load = partial(adapted_model, plan, trained, base_dtype)
    return Reference(batches, text, answers(partial(load, "unmerged", _is_int8(plan)), plan.task, batches))


def _is_int8(plan: Plan) -> bool:
    return plan.recipe.model.quantization == "int8"


def _verify(
    plan: Plan, reference: Reference | None, trained: Path, out: Path, base_dtype: torch.dtype, dtype: str, to: str
) -> dict[str, Any]:
    """Compare what was written with the unmerged model, write merge_report.json, and check the recipe's bounds.

    Args:
        trained: folder of the adapter, or of the model that was trained as a whole.
        out: what was written.
        base_dtype: what the unmerged model computes in.
        dtype: of the written weights.
        to: `model` or `lora`.

    Raises:
        CheckFailed: outside of the bounds.
    """
    if reference is None:
        values: dict[str, Any] = {"compared": False}
        _write_report(out, values)
        return values
    exported = partial(adapted_model, plan, out, base_dtype, "exported", _is_int8(plan))
    load = exported if to == "lora" else partial(merged_model, out)
    report = compare(reference.answers, answers(load, plan.task, reference.batches), reference.text)
    values = report.as_dict()
    if _is_int8(plan):
        folders = {"int8": trained} | ({"int8_exported": out} if to == "lora" else {})
        for name, adapter in folders.items():
            load = partial(adapted_model, plan, adapter, base_dtype, "in int8", False)
            rounded = answers(load, plan.task, reference.batches)
            values[name] = compare(reference.answers, rounded, "the same").as_dict()
    _write_report(out, values)
    require_within(report, plan.recipe.merge, advice(dtype, base_dtype))
    return values


def _write_report(out: Path, values: dict[str, Any]) -> None:
    (out / REPORT).write_text(json.dumps(values, indent=1) + "\n")


def _score_merged(folder: RunFolder, recipe: Recipe, out: Path) -> None:
    """Add the scores of RUN/merged on the test rows to summary.json, where there are such rows and they are here."""
    if recipe.data.test is None:
        return
    try:
        plan = make_plan(recipe_for_scores(folder, recipe, "test"))
    except UserError as error:
        print(f"The test rows were not scored. {error}")
        return
    folder.update_summary({"test_merged": score_model(plan, load_merged(out), "test")})


def _requantise(plan: Plan, out: Path, reference: Reference | None, values: dict[str, Any]) -> None:
    """Replace the merged folder by its nf4 twin, with what that costs against the unmerged model in its report.

    Args:
        values: of the dense model's report.

    Raises:
        CheckFailed: when the twin agrees too seldom, or there is no memory for it; the dense folder stays then.
    """
    print(f"quantising the merged model to nf4 again, because {values['not_lossless']}", flush=True)
    stays = f"The dense merged model is in {out}, and no nf4 model was written."
    try:
        with whole_folder(out) as quantised:
            load = partial(_quantised_twin, plan, out, quantised)
            if reference is None:
                load()
            else:
                found = answers(load, plan.task, reference.batches)
                cost = compare(reference.answers, found, "the same")
                values = values | {"requantised": cost.as_dict()}
                _print(out, "nf4", cost.as_dict(), plan.task.scored)
                bound = plan.recipe.merge.min_nf4_top1_agreement
                if not cost.top1_agreement >= bound:
                    _write_report(out, values)
                    raise CheckFailed(
                        f"nf4 changes too many answers: top-1 agreement {cost.top1_agreement:.4f} is below "
                        f"merge.min_nf4_top1_agreement {bound}. {stays}"
                    )
            plan.task.save_preprocessing(quantised)
            _write_report(quantised, values)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise CheckFailed(f"There was not enough memory to quantise the merged model: {error} {stays}") from error


def _quantised_twin(plan: Plan, dense: Path, out: Path) -> Any:
    """Return the nf4 twin of a dense model folder, after writing it into another."""
    section = plan.recipe.model.model_copy(update={"quantization": "nf4"})
    where = choose_device()
    where = where if fits(weight_bytes(section, dense, where), where) else torch.device("cpu")
    model = load_base(section, dense, where)
    model.config.use_cache = True
    model.save_pretrained(out)
    return model.eval()


def _print(out: Path, title: str, values: dict[str, Any], scored: str) -> None:
    if values.get("compared") is False:
        print(f"{out}: written, and not compared with the unmerged model (--no-compare)")
        return
    print(
        f"{out}: {title} against the unmerged model, on {values['tokens']} {scored} of {values['text']}\n"
        f"  max_abs_logit_diff {values['max_abs_logit_diff']:.2e}  top1_agreement {values['top1_agreement']:.4f}  "
        f"loss_before {values['loss_before']:.4f}  loss_after {values['loss_after']:.4f}",
        flush=True,
    )
