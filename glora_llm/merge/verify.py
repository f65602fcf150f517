"""How exact a merge was: the merged model against the unmerged one, on real text, both loaded from disk."""

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from glora_llm.errors import CheckFailed
from glora_llm.evaluation.command import device
from glora_llm.plan import Batch, Plan
from glora_llm.schema import MergeSection

MOST_TOKENS = 1024


@dataclass(frozen=True)
class Answers:
    """What a model makes of the comparison's text: logits (N, V) float32 of all tokens, and the mean target loss."""

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


def comparison_batches(plan: Plan) -> tuple[list[Batch], str]:
    """Return up to 1,024 tokens of held-out rows (of training rows where none are held out), a row a batch."""
    rows = plan.data.validation or plan.data.test or plan.data.train
    batches: list[Batch] = []
    tokens = 0
    for index in plan.choice(rows, None):
        if tokens >= MOST_TOKENS:
            break
        batch = {name: tensor[:, : MOST_TOKENS - tokens] for name, tensor in plan.batch(rows, [index]).items()}
        batches.append(batch)
        tokens += batch["input_ids"].numel()
    return batches, f"{len(batches)} {rows.name} rows"


@torch.no_grad()
def answers(load: Callable[[], Any], batches: list[Batch]) -> Answers:
    """Load a model, run the batches through it, and let go of it again."""
    model = load()
    logits, losses = [], []
    for batch in batches:
        moved = {name: tensor.to(device()) for name, tensor in batch.items()}
        out = model(input_ids=moved["input_ids"], position_ids=moved["position_ids"], use_cache=False).logits.float()
        logits.append(out[0].cpu())
        losses.append(torch.nn.functional.cross_entropy(out[0, :-1], moved["labels"][0, 1:], reduction="none").cpu())
    targets = torch.cat([batch["labels"][0, 1:] for batch in batches]) != -100
    del model
    gc.collect()
    return Answers(torch.cat(logits), float(torch.cat(losses)[targets].mean()))


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


def require_within(report: MergeReport, bounds: MergeSection) -> None:
    """Check a report against the recipe's bounds.

    Raises:
        CheckFailed: naming the value and its bound.
    """
    change = abs(report.loss_after - report.loss_before)
    if not report.top1_agreement >= bounds.min_top1_agreement:
        raise CheckFailed(
            f"top-1 agreement {report.top1_agreement:.4f} is below merge.min_top1_agreement "
            f"{bounds.min_top1_agreement}. Try --dtype float32."
        )
    if not change <= bounds.max_loss_change:
        raise CheckFailed(
            f"the loss changed by {change:.4f}, more than merge.max_loss_change {bounds.max_loss_change}. "
            "Try --dtype float32."
        )
