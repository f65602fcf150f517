"""The largest batches of a recipe: of its data where they are on this machine, else of full rows."""

import math
from typing import Any

from glora_llm.data.batch import LONGEST_JOINED, MOST_PADDING
from glora_llm.plan.plan import Plan
from glora_llm.training.batch import Batch

MOST_STEPS = 2000  # whose micro batches are looked at


def largest_micro_batch(plan: Plan) -> Batch:
    """Return the micro batch with the most tokens among those of the first epoch (of MOST_STEPS at most)."""
    sampler, micro = plan.sampler, plan.recipe.training.micro_batch
    steps = min(plan.steps, math.ceil(sampler.steps_per_epoch), MOST_STEPS)
    lengths = plan.task.train.lengths()
    most, chosen, place = -1, [0], (0, 0)
    for step in range(steps):
        rows = sampler.step_rows(step)
        for start in range(0, len(rows), micro):
            part = rows[start : start + micro]
            tokens = _joined_tokens([int(lengths[row]) for row in part])
            if tokens > most:
                most, chosen, place = tokens, part, (step, start)
    return plan.task.training_batch(chosen, *place)


def largest_scored_batch(plan: Plan) -> Batch:
    """Return the batch with the most tokens of those that evaluation scores; there must be validation or test rows."""
    scored = filter(None, (plan.task.validation, *plan.task.tests.values()))
    found = [_most_padded(rows, plan.recipe.evaluation.batch) for rows in scored]
    _, rows, numbers = max(found, key=lambda item: item[0])
    return plan.batch(rows, numbers)


def longest_rows(plan: Plan, count: int) -> Batch:
    """Return the `count` longest validation rows as one batch: the most that a search differentiates at once."""
    rows: Any = plan.rows("validation")
    lengths = rows.lengths()
    return plan.batch(rows, sorted(range(len(rows)), key=lambda row: -lengths[row])[:count])


def _most_padded(rows: Any, size: int) -> tuple[int, Any, list[int]]:
    """Return (tokens, rows, numbers) of the largest batch: rows of like length share one."""
    lengths = rows.lengths()
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    largest = max(batches, key=lambda batch: len(batch) * lengths[batch[-1]])
    return len(largest) * int(lengths[largest[-1]]), rows, largest


def _joined_tokens(lengths: list[int]) -> int:
    """Return the tokens that `data.batch.collate_joined` makes of rows of these lengths."""
    padded, together = len(lengths) * max(lengths), sum(lengths)
    return together if 1 - together / padded > MOST_PADDING and together <= LONGEST_JOINED else padded
