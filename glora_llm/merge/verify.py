"""Compare a merged model with the unmerged one on real text, both loaded from disk."""

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glora_llm.errors import CheckFailed
from glora_llm.evaluation.trained import load_adapted, load_merged, stream_adapted, stream_merged
from glora_llm.launch.device import choose_device
from glora_llm.plan.plan import Plan
from glora_llm.schema import MergeSection
from glora_llm.tasks.task import Task
from glora_llm.training.batch import Batch, to_device


@dataclass(frozen=True)
class Answers:
    """Answers of a model to the comparison's text: logits (N, V) float32 of all tokens, and the mean target loss."""

    logits: Tensor
    loss: float


@dataclass(frozen=True)
class MergeReport:
    """The comparison.

    Args:
        max_abs_logit_diff: over all tokens and the whole vocabulary.
        top1_agreement: share of tokens with the same most likely next token.
        loss_before, loss_after: mean -log p of the target tokens, unmerged and merged, nats/token.
        tokens: compared.
        text: what the text was.
    """

    max_abs_logit_diff: float
    top1_agreement: float
    loss_before: float
    loss_after: float
    tokens: int
    text: str

    def as_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return asdict(self)


def adapted_model(plan: Plan, adapter: Path, dtype: torch.dtype, title: str, dense: bool) -> Any:
    """Return the unmerged model, in memory layer by layer where its files allow that.

    Args:
        dtype: what the base was computed in when the adapter was trained.
        title: of the progress bar.
        dense: unpack quantised weights, so that int8 layers do not round what they are given.
    """
    streamed = stream_adapted(plan, adapter, choose_device(), dtype, title, dense)
    return streamed or load_adapted(plan, adapter, dtype, False, dense)


def merged_model(folder: Path) -> Any:
    """Return the merged model, in memory layer by layer where its files allow that."""
    return stream_merged(folder, choose_device(), "merged") or load_merged(folder)


@torch.no_grad()
def answers(load: Callable[[], Any], task: Task, batches: list[Batch]) -> Answers:
    """Load a model, run the batches through it, and let go of it again."""
    model = load()
    parts = [task.answers(model, to_device(batch, model.device)) for batch in batches]
    del model
    gc.collect()
    return Answers(torch.cat([logits for logits, _ in parts]), float(torch.cat([losses for _, losses in parts]).mean()))


def compare(before: Answers, after: Answers, text: str) -> MergeReport:
    """Return the report of a merged model (`after`) against the unmerged one."""
    return MergeReport(
        max_abs_logit_diff=float((before.logits - after.logits).abs().max()),
        top1_agreement=float((before.logits.argmax(-1) == after.logits.argmax(-1)).float().mean()),
        loss_before=before.loss,
        loss_after=after.loss,
        tokens=len(before.logits),
        text=text,
    )


def advice(dtype: str, base_dtype: torch.dtype) -> str:
    """Return what to do about a result outside its bounds.

    Args:
        dtype: of the written weights.
        base_dtype: what the unmerged model computes in.
    """
    if dtype != "float32":
        return "Try --dtype float32."
    if base_dtype != torch.float32:
        short = str(base_dtype).removeprefix("torch.")
        return f"The result is in float32; the unmerged model computes in {short}, and its rounding may be the cause."
    return "Both are computed in float32, so rounding is not the cause: the result is wrong."


def require_within(report: MergeReport, bounds: MergeSection, remedy: str) -> None:
    """Check a report against the recipe's bounds.

    Args:
        remedy: what to do, at the end of the message.

    Raises:
        CheckFailed: naming the value and its bound.
    """
    change = abs(report.loss_after - report.loss_before)
    if not report.top1_agreement >= bounds.min_top1_agreement:
        raise CheckFailed(
            f"top-1 agreement {report.top1_agreement:.4f} is below merge.min_top1_agreement "
            f"{bounds.min_top1_agreement}. {remedy}"
        )
    if not change <= bounds.max_loss_change:
        raise CheckFailed(
            f"the loss changed by {change:.4f}, more than merge.max_loss_change {bounds.max_loss_change}. {remedy}"
        )
