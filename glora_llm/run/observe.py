"""Values that a run logs beside its losses: increments of VLoRA, terms of a distillation, and its reference."""

from collections.abc import Callable
from typing import Any

import torch

from glora_llm.plan.plan import Plan
from glora_llm.run.build import TrainingParts, reference_objective
from glora_llm.training.batch import Batch, to_device
from glora_llm.training.distill import DistilledObjective
from glora_llm.vlora import m_steps

# (split, limit of rows, batch -> its scores; None: those of the model that is trained) -> scores of the split
Score = Callable[[str, int | None, Callable[[Batch], Any] | None], dict[str, float]]


def observed(parts: TrainingParts) -> dict[str, float]:
    """Return numbers that are logged with those of a step; all processes call it together.

    The size of each layer's increment is the M step of the VLoRA paper.
    """
    sizes = {f"vlora/increment/layer_{number:02d}": size for number, size in m_steps(parts.vlora_stack).items()}
    objective = parts.engine.objective
    return sizes | (objective.observe() if isinstance(objective, DistilledObjective) else {})


def scores_at_start(plan: Plan, parts: TrainingParts, score: Score) -> dict[str, dict[str, float]]:
    """Return what a model that learns from another one is measured by: both models' scores before the first step.

    They are of the test rows, or else of the validation rows: `teacher` of a distillation's teacher, `dense` of the
    dense model that the layers were made of, `at_start` of the model that is trained. Nothing where it is alone.
    """
    rows = "test" if plan.rows("test") is not None else "validation"
    if parts.start or plan.rows(rows) is None:
        return {}
    reference = reference_objective(plan, parts.engine.objective, parts.engine.device)
    if reference is None:
        return {}
    name, objective = reference

    @torch.no_grad()
    def of_reference(batch: Batch) -> Any:
        return objective(**to_device(batch, parts.engine.device), score=True)

    return {name: score(rows, None, of_reference), "at_start": score(rows, None, None)}
