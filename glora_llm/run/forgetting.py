"""Forgetting: the loss on a text that is not trained on, without and with the adapter."""

from typing import Any

from glora_llm.evaluation.forgetting import text_loss
from glora_llm.launch.ranks import Processes
from glora_llm.plan.plan import Plan
from glora_llm.run.build import TrainingParts


def text_before(plan: Plan, parts: TrainingParts, processes: Processes) -> dict[str, Any]:
    """Return the entry `forgetting` of summary.json before the first step, of a model trained as a whole.

    An adapter can be switched off at the end; a model that is trained as a whole is gone by then.
    """
    if plan.recipe.evaluation.forgetting is None or not plan.recipe.adapter.is_full or parts.start:
        return {}
    return {"forgetting": {"before": _loss(plan, parts, processes)}}


def text_without_and_with(
    plan: Plan, parts: TrainingParts, processes: Processes, summary: dict[str, Any]
) -> dict[str, Any]:
    """Return the entry `forgetting` of summary.json at the end: the loss `before` and `after`, nats a token.

    Args:
        summary: what summary.json holds so far.
    """
    if plan.recipe.evaluation.forgetting is None:
        return {}
    after = _loss(plan, parts, processes)
    if plan.recipe.adapter.is_full:
        return {"forgetting": summary.get("forgetting", {}) | {"after": after}}
    with parts.model.disable_adapter():
        before = _loss(plan, parts, processes)
    return {"forgetting": {"before": before, "after": after}}


def _loss(plan: Plan, parts: TrainingParts, processes: Processes) -> float:
    place = processes.process_rank, processes.world_size
    return text_loss(plan, parts.engine.score, parts.engine.gather_rows, *place)
