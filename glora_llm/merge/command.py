"""`glora-llm merge RUN --out DIR`: write, reload with plain transformers, compare, report."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from glora_llm.errors import CheckFailed, UserError
from glora_llm.evaluation.scoring import score_model
from glora_llm.evaluation.trained import load_adapted, load_merged
from glora_llm.launch.device import choose_device
from glora_llm.merge.lora_export import write_lora
from glora_llm.merge.model_merge import write_merged
from glora_llm.merge.verify import Answers, MergeReport, answers, compare, comparison_batches, require_within
from glora_llm.merge.whole_model import trained_model, write_dense
from glora_llm.models.load import load_base
from glora_llm.plan.genome import deployed
from glora_llm.plan.plan import Plan, make_plan, require_same_base
from glora_llm.plan.run_folder import RunFolder
from glora_llm.schema import MergeSection
from glora_llm.training import checkpoint


def merge_run(
    run: Path,
    out: Path,
    dtype: str | None = None,
    to: str = "model",
    quantize: str | None = None,
    step: int | None = None,
    genome: Path | None = None,
) -> None:
    """Merge or export what a run trained, compare the result with the unmerged model, and write merge_report.json.

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
    found = None if step is None else _checkpoint(folder, step)
    is_full = folder.recipe().adapter.is_full
    recipe, adapter = deployed(folder, found / "adapter" if found else folder.trained(folder.recipe()), genome)
    if is_full and to == "lora":
        raise UserError(f"--to lora exports GLoRA adapters, and {run} trained a whole model. Use --to model.")
    plan = make_plan(recipe)
    base_dtype = require_same_base(folder, plan)
    quantize = quantize or plan.recipe.merge.quantize
    if to == "lora" and (dtype or quantize == "nf4"):
        raise UserError("--dtype and --quantize are for --to model; a LoRA is written in float32.")
    if out.exists():
        raise UserError(f"{out} exists already; name a new folder, or delete it.")
    wanted = dtype or plan.recipe.merge.dtype
    batches, text = comparison_batches(plan)
    with trained_model(plan, folder.model, found) if is_full else nullcontext(adapter) as trained:
        if is_full:
            write_dense(plan, trained, out, wanted)
        elif to == "lora":
            write_lora(plan, trained, out, base_dtype)
        else:
            write_merged(plan, trained, out, base_dtype, wanted)
        before = answers(lambda: load_adapted(plan, trained), plan.task, batches)
    after = answers(lambda: load_adapted(plan, out) if to == "lora" else load_merged(out), plan.task, batches)
    report = compare(before, after, text)
    values = report.as_dict()
    if to == "model" and quantize == "nf4":
        values["requantised"] = _requantise(plan, out, batches, before)
    (out / "merge_report.json").write_text(json.dumps(values, indent=1) + "\n")
    _print(values, out, plan.task.scored)
    _require_within(report, plan.recipe.merge, out)
    usual = (
        genome is None
        and to == "model"
        and step is None
        and quantize == "none"
        and out.resolve() == (run / "merged").resolve()
    )
    if usual and plan.task.test is not None:
        folder.update_summary({"test_merged": score_model(plan, load_merged(out), "test")})


def _require_within(report: MergeReport, bounds: MergeSection, out: Path) -> None:
    """Check the bounds; what fails them is kept under another name, so that nobody takes it for good."""
    try:
        require_within(report, bounds)
    except CheckFailed as error:
        failed = out.with_name(f"{out.name}.failed")
        shutil.rmtree(failed, ignore_errors=True)
        out.rename(failed)
        raise CheckFailed(f"{error} It is in {failed}.") from None


def _checkpoint(folder: RunFolder, step: int) -> Path:
    found = folder.checkpoints / f"step-{step}"
    if not found.is_dir():
        kept = ", ".join(str(checkpoint.step_of(path)) for path in checkpoint.checkpoints(folder.checkpoints))
        raise UserError(f"{folder.path} has no checkpoint of step {step}; kept: {kept or 'none'}.")
    problem = checkpoint.fault(found)
    if problem:
        raise UserError(f"{found} is broken: {problem}.")
    return found


def _requantise(plan: Plan, out: Path, batches: list[Any], before: Answers) -> dict[str, Any]:
    """Replace the merged folder by its nf4 twin; return what that costs against the unmerged model."""
    section = plan.recipe.model.model_copy(update={"quantization": "nf4"})
    quantised = out.with_name(f".quantised-{out.name}")
    shutil.rmtree(quantised, ignore_errors=True)

    def load() -> Any:
        model = load_base(section, out, choose_device(), zero3=False)
        model.config.use_cache = True
        model.save_pretrained(quantised)
        return model.eval()

    cost = compare(before, answers(load, plan.task, batches), "the same").as_dict()
    plan.task.save_preprocessing(quantised)
    shutil.rmtree(out)
    quantised.rename(out)
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
