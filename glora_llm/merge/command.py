"""`glora-llm merge RUN --out DIR`: write, reload with plain transformers, compare, report."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from glora_llm.atomic import require_new, whole_folder
from glora_llm.errors import CheckFailed, UserError
from glora_llm.evaluation.scoring import score_model
from glora_llm.evaluation.trained import fits, load_merged, weight_bytes, whole_model
from glora_llm.launch.device import choose_device
from glora_llm.merge.lora_export import write_lora
from glora_llm.merge.model_merge import write_merged
from glora_llm.merge.verify import (
    Answers,
    adapted_model,
    answers,
    compare,
    comparison_batches,
    merged_model,
    require_within,
)
from glora_llm.merge.whole_model import write_dense
from glora_llm.models.load import load_base
from glora_llm.plan.genome import deployed
from glora_llm.plan.plan import Plan, make_plan, require_same_base
from glora_llm.plan.run_folder import RunFolder
from glora_llm.plan.trained_weights import trained_weights

REPORT = "merge_report.json"


def merge_run(
    run: Path,
    out: Path,
    dtype: str | None = None,
    to: str = "model",
    quantize: str | None = None,
    step: int | None = None,
    genome: Path | None = None,
) -> None:
    """Merge or export what a run trained, verify it against the unmerged model, and write merge_report.json.

    Args:
        run: the run folder.
        out: the folder to make.
        dtype: of the written weights; None: the recipe's merge.dtype.
        to: `model`, or `lora` for a plain LoRA adapter.
        quantize: `nf4` quantises the merged model again; None: the recipe's merge.quantize.
        step: a kept checkpoint; None: the end of the run.
        genome: of a supernet; None: RUN/genome.json.

    Raises:
        UserError: when something does not fit; nothing is written then.
        CheckFailed: when the result differs from the unmerged model by more than the recipe's bounds.
    """
    folder = RunFolder(run)
    weights, checkpoint = trained_weights(folder, step)
    is_full = folder.recipe().adapter.is_full
    recipe, adapter = deployed(folder, weights, genome)
    if is_full and to == "lora":
        raise UserError(f"--to lora exports GLoRA adapters, and {run} trained a whole model. Use --to model.")
    plan = make_plan(recipe)
    base_dtype = require_same_base(folder, plan)
    quantize = quantize or plan.recipe.merge.quantize
    if to == "lora" and (dtype or quantize == "nf4"):
        raise UserError("--dtype and --quantize are for --to model; a LoRA is written in float32.")
    require_new(out)
    wanted = dtype or plan.recipe.merge.dtype
    with exact_float32(), whole_model(plan, folder.model, checkpoint) if is_full else nullcontext(adapter) as trained:
        with published(out) as working:
            if is_full:
                write_dense(plan, trained, working, wanted)
            elif to == "lora":
                write_lora(plan, trained, working, base_dtype)
            else:
                write_merged(plan, trained, working, base_dtype, wanted)
            values = _verify(plan, trained, working, base_dtype, to, quantize)
        _print(values, out, plan.task.scored)
    usual = (
        genome is None
        and to == "model"
        and step is None
        and quantize == "none"
        and out.resolve() == (run / "merged").resolve()
    )
    if usual and plan.task.test is not None:
        folder.update_summary({"test_merged": score_model(plan, load_merged(out), "test")})


def _verify(plan: Plan, trained: Path, out: Path, base_dtype: torch.dtype, to: str, quantize: str) -> dict[str, Any]:
    """Compare what was written with the unmerged model, write merge_report.json, and check the recipe's bounds.

    Raises:
        CheckFailed: outside of the bounds.
    """
    batches, text = comparison_batches(plan)
    before = answers(partial(adapted_model, plan, trained, base_dtype, "unmerged"), plan.task, batches)
    if to == "lora":
        after = answers(partial(adapted_model, plan, out, base_dtype, "exported"), plan.task, batches)
    else:
        after = answers(partial(merged_model, out), plan.task, batches)
    report = compare(before, after, text)
    values = report.as_dict()
    if to == "model" and quantize == "nf4":
        values["requantised"] = _requantise(plan, out, batches, before)
    (out / REPORT).write_text(json.dumps(values, indent=1) + "\n")
    require_within(report, plan.recipe.merge)
    return values


@contextlib.contextmanager
def published(out: Path) -> Iterator[Path]:
    """Give a folder to write and to verify in; it gets the name `out` when both are done.

    A folder that was written and could not be verified, or failed, is kept as OUT.failed, with a report that says why.

    Raises:
        CheckFailed: when verification fails, or there is not enough memory for it.
    """
    working, failed = out.with_name(f".merging-{out.name}"), out.with_name(f"{out.name}.failed")
    shutil.rmtree(working, ignore_errors=True)
    try:
        yield working
    except BaseException as error:
        if not working.exists():
            raise
        shutil.rmtree(failed, ignore_errors=True)
        working.rename(failed)
        if not (failed / REPORT).exists():
            said = f"not verified: {type(error).__name__}: {error}"
            (failed / REPORT).write_text(json.dumps({"error": said}, indent=1) + "\n")
        if isinstance(error, CheckFailed | UserError):
            raise type(error)(f"{error} It is in {failed}.") from None
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise CheckFailed(
                f"There was not enough memory to verify the result, which is in {failed}: {error} Free some memory and "
                "merge again; DS_ACCELERATOR=cpu keeps the merge off the GPU."
            ) from error
        error.add_note(f"What was written could not be verified. It is in {failed}.")
        raise
    working.rename(out)


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Let products of float32 matrices be float32 products on a GPU too, whatever training allowed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _requantise(plan: Plan, out: Path, batches: list[Any], before: Answers) -> dict[str, Any]:
    """Replace the merged folder by its nf4 twin; return what that costs against the unmerged model."""
    section = plan.recipe.model.model_copy(update={"quantization": "nf4"})
    with whole_folder(out) as quantised:

        def load() -> Any:
            where = choose_device()
            where = where if fits(weight_bytes(section, out, where), where) else torch.device("cpu")
            model = load_base(section, out, where)
            model.config.use_cache = True
            model.save_pretrained(quantised)
            return model.eval()

        cost = compare(before, answers(load, plan.task, batches), "the same").as_dict()
        plan.task.save_preprocessing(quantised)
    return cost


def _print(values: dict[str, Any], out: Path, scored: str) -> None:
    print(f"{out}: compared with the unmerged model on {values['tokens']} {scored} of {values['text']}")
    for title, part in (("merged", values), ("nf4 again", values.get("requantised"))):
        if part:
            print(
                f"  {title:10s} max_abs_logit_diff {part['max_abs_logit_diff']:.2e}  "
                f"top1_agreement {part['top1_agreement']:.4f}  "
                f"loss_before {part['loss_before']:.4f}  loss_after {part['loss_after']:.4f}"
            )
