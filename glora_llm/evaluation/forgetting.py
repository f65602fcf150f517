"""The loss of a language model on a text that a run is not trained on, to measure what training costs elsewhere."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from glora_llm.atomic import cache_root
from glora_llm.data.prepare import prepare
from glora_llm.evaluation.scoring import score_chosen
from glora_llm.plan.other_text import require_language_model, text_section
from glora_llm.plan.plan import Plan
from glora_llm.tasks.text import TextTask
from glora_llm.training.batch import Batch

ROWS = 16  # at most so many rows: their 4,096 tokens take seconds beside a training


def text_loss(
    plan: Plan,
    score: Callable[[Batch], Any],
    gather: Callable[[Tensor], Tensor],
    process_rank: int = 0,
    world_size: int = 1,
) -> float:
    """Return the mean cross entropy, nats a token, of the first 16 rows of 256 tokens of evaluation.forgetting.

    Args:
        score, gather, process_rank, world_size: as of `evaluation.scoring.score_rows`.

    Raises:
        UserError: for a source that cannot be read, and a task that is not of a language model.
    """
    require_language_model(plan.recipe, isinstance(plan.task, TextTask))
    assert plan.recipe.evaluation.forgetting is not None and isinstance(plan.task, TextTask)
    data = prepare(text_section(plan.recipe.evaluation.forgetting), plan.task.tokenizer, cache_root() / "data", seed=0)
    there = replace(plan, task=replace(plan.task, data=data))
    numbers = range(min(ROWS, len(data.train)))
    table = score_chosen(there, data.train, numbers, score, gather, process_rank, world_size)
    return float(table[:, 0].sum() / table[:, 1].sum())
