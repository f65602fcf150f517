"""`glora-llm merge RUN --out DIR`: write, reload with plain transformers, compare, report."""

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from glora_llm.adapters.start import ADAPTER_WEIGHTS
from glora_llm.atomic import require_new, whole_folder
from glora_llm.errors import CheckFailed, UserError
from glora_llm.evaluation.scoring import score_model
from glora_llm.evaluation.trained import fits, load_merged, weight_bytes, whole_model
from glora_llm.failpoints import reach
from glora_llm.launch.device import choose_device
from glora_llm.merge.choices import LLAMA_CPP, MergeChoices
from glora_llm.merge.fitting import Fitted, fitted
from glora_llm.merge.gguf_folder import to_gguf
from glora_llm.merge.latency import latency_in_words, measure_latency
from glora_llm.merge.lora_export import write_lora
from glora_llm.merge.lossless import losses_of, merge_lossless
from glora_llm.merge.model_merge import write_merged
from glora_llm.merge.published import REPORT, exact_float32, published
from glora_llm.merge.reference import Reference, is_int8, reference_of
from glora_llm.merge.targets import lora_servers
from glora_llm.merge.verify import (
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
    folder = RunFolder(run)
    weights, checkpoint = trained_weights(folder, chosen.step)
    recipe, adapter = deployed(folder, weights, chosen.genome)
    is_full = recipe.adapter.is_full
    quantize = chosen.quantize or recipe.merge.quantize
    chosen.check(quantize, is_full)
    plan = make_plan(recipe_for_merge(folder, recipe))
    base_dtype = require_same_base(folder, plan)
    require_new(out)
    dtype = "float32" if chosen.to == "lora" else chosen.dtype or recipe.merge.dtype
    print(f"{'exporting' if chosen.to == 'lora' else 'merging'} {run} into {out}", flush=True)
    with exact_float32(), contextlib.ExitStack() as stack:
        trained = stack.enter_context(whole_model(plan, folder.model, checkpoint)) if is_full else adapter
        fit = stack.enter_context(fitted(plan, folder, trained, base_dtype, chosen))
        losses = _losses(fit, quantize)
        if quantize != "none" and not losses:
            written = getattr(torch, chosen.dtype) if chosen.dtype else base_dtype
            merge_lossless(fit.plan, folder, fit.trained, out, (base_dtype, written), chosen.compared)
            more = {"latency": measure_latency(fit.plan, out, "nf4")} if chosen.compared else {}
            _add_to_report(out, fit.report() | more)
            _print_latency(more)
            return
        parts = {".": fit}
        if chosen.both:
            parts = {"whole": Fitted(plan, trained), f"without_{'_'.join(chosen.without)}": fit}
        with published(out) as working:
            made = {
                name: _make(part, folder, working / name, base_dtype, dtype, chosen) for name, part in parts.items()
            }
            if quantize == "nf4":  # its twin is made of what is published
                _add_to_report(working, {"not_lossless": losses})
        for name, (_, values) in made.items():
            _print_all(out / name, values, plan.task.scored)
        if quantize == "nf4":
            reference, values = made["."]
            _requantise(plan, out, reference, values | {"not_lossless": losses})
    usual = chosen.is_usual and quantize == "none"
    if usual and out.resolve() == (run / "merged").resolve():
        score_merged(folder, recipe, out)


def _losses(fit: Fitted, quantize: str) -> str | None:
    """Return why the merged model has to be quantised again; None: it has not, or is not to be quantised.

    Raises:
        UserError: when that is so, and the recipe or the command says that it must not be.
    """
    if quantize == "none":
        return None
    is_full = fit.plan.recipe.adapter.is_full
    losses = "the whole model was trained" if is_full else losses_of(fit.plan, fit.trained)
    if losses and quantize == "nf4_lossless":
        raise UserError(refuse_losses(losses))
    return losses


def _make(
    fit: Fitted, folder: RunFolder, out: Path, base_dtype: torch.dtype, dtype: str, chosen: MergeChoices
) -> tuple[Reference | None, dict[str, Any]]:
    """Write a merged model or an export, and verify it; return what it was compared with, and its report.

    Args:
        base_dtype: what the unmerged model computes in.
        dtype: of the written weights.
    """
    plan, trained = fit.plan, fit.trained
    if plan.recipe.adapter.is_full:
        write_dense(plan, trained, out, dtype)
    elif chosen.to == "lora":
        write_lora(plan, trained, out, base_dtype)
    else:
        write_merged(plan, trained, out, base_dtype, dtype)
    reach("merge.before_verify")
    reference = fit.reference
    if reference is None and chosen.compared:
        reference = reference_of(plan, folder, trained, base_dtype)
    values = _verify(plan, reference, trained, out, base_dtype, dtype, chosen.to)
    values |= fit.report()
    if chosen.compared and chosen.to == "model" and not plan.recipe.adapter.is_full:
        values["latency"] = measure_latency(plan, out)
    _write_report(out, values)
    if chosen.target == LLAMA_CPP:
        to_gguf(out)
    return reference, values


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
    exported = partial(adapted_model, plan, out, base_dtype, "exported", is_int8(plan))
    load = exported if to == "lora" else partial(merged_model, out)
    report = compare(reference.answers, answers(load, plan.task, reference.batches), reference.text)
    values = report.as_dict()
    if is_int8(plan):
        folders = {"int8": trained} | ({"int8_exported": out} if to == "lora" else {})
        for name, adapter in folders.items():
            load = partial(adapted_model, plan, adapter, base_dtype, "in int8", False)
            rounded = answers(load, plan.task, reference.batches)
            values[name] = compare(reference.answers, rounded, "the same").as_dict()
    _write_report(out, values)
    require_within(report, plan.recipe.merge, advice(dtype, base_dtype))
    return values


def _write_report(out: Path, values: dict[str, Any]) -> None:
    (out / REPORT).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _add_to_report(out: Path, more: dict[str, Any]) -> None:
    if more:
        _write_report(out, json.loads((out / REPORT).read_text(encoding="utf-8")) | more)


def score_merged(folder: RunFolder, recipe: Recipe, out: Path) -> None:
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


def _print_all(out: Path, values: dict[str, Any], scored: str) -> None:
    _print(out, "the result", values, scored)
    for name, title in ROUNDED.items():
        if name in values:
            _print(out, title, values[name], scored)
    _print_latency(values)
    if (out / ADAPTER_WEIGHTS).is_file():
        for line in lora_servers(out):
            print(f"  {line}")


def _print_latency(values: dict[str, Any]) -> None:
    if "latency" in values:
        print(f"  {latency_in_words(values['latency'])}", flush=True)


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
