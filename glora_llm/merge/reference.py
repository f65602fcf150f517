"""The reference of a merge: the answers of the unmerged model, on text that the run kept."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from glora_llm.merge.sample import comparison_batches
from glora_llm.merge.verify import Answers, adapted_model, answers
from glora_llm.plan.plan import Plan
from glora_llm.plan.run_folder import RunFolder


@dataclass(frozen=True)
class Reference:
    """The answers of the unmerged model, with which a result is compared.

    The linears of an int8 model round what they are given to 8 bits (those that GLoRA adapts do not). No merged model
    does, so the reference of an int8 run has the same unpacked weights in dense linears, and what rounding changes is
    reported by itself: it says nothing about the merge.

    Args:
        batches: the model's inputs.
        text: what they are in words.
        answers: of the unmerged model.
    """

    batches: list[Any]
    text: str
    answers: Answers


def reference_of(plan: Plan, folder: RunFolder, trained: Path, base_dtype: torch.dtype) -> Reference:
    """Return the answers of the unmerged model.

    Args:
        trained: folder of the adapter, or of the model that was trained as a whole.
        base_dtype: what the unmerged model computes in.
    """
    batches, text = comparison_batches(plan, folder)
    load = partial(adapted_model, plan, trained, base_dtype)
    return Reference(batches, text, answers(partial(load, "unmerged", is_int8(plan)), plan.task, batches))


def is_int8(plan: Plan) -> bool:
    """Tell whether the base's linears round what they are given to 8 bits."""
    return plan.recipe.model.quantization == "int8"
