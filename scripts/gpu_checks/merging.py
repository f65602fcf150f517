"""Check 8: an adapter that was trained here is merged, compared with the unmerged model, and scored on the device."""

import json
from collections.abc import Iterator

from glora_llm.evaluation.scoring import score_model
from glora_llm.evaluation.trained import load_adapted
from glora_llm.merge.command import merge_run
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from scripts.gpu_checks.context import Context
from scripts.gpu_checks.launching import summary
from scripts.gpu_checks.report import Row, absent, compared

AGREEMENT, LOSS = 0.97, 0.02  # share of tokens; nats a token


def check(context: Context) -> Iterator[Row]:
    """Merge and score what check 4 trained."""
    run = context.out / "stages" / "zero2-nf4"
    if not run.is_dir():
        yield absent("merge and scores", "check 4, whose run is merged here, was left out")
        return
    merged = context.out / "merged"
    merge_run(run, merged)
    report = json.loads((merged / "merge_report.json").read_text(encoding="utf-8"))
    agreement, change = report["top1_agreement"], abs(report["loss_after"] - report["loss_before"])
    wanted = f"at least {AGREEMENT}"
    yield compared(
        "merged: tokens of the same first choice", wanted, f"{agreement:.4f}", agreement >= AGREEMENT, **report
    )
    yield compared("merged: change of the loss", f"at most {LOSS}", f"{change:.4f} nats a token", change <= LOSS)
    folder = RunFolder(run)
    plan = make_plan(folder.recipe())
    loss = score_model(plan, load_adapted(plan, folder.trained(plan.recipe)), "test")["test/loss"]
    trained = summary(run)["test"]["test/loss"]
    wanted = f"{trained:.4f}, as at the end of training"
    yield compared("evaluate: test loss", wanted, f"{loss:.4f}", abs(loss / trained - 1) <= LOSS)
