"""Multiple choice: the right option is learnt, and scored against the others by its likelihood."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from glora_llm.data.option_batch import collate_options
from glora_llm.data.store import TokenSet
from glora_llm.models.attention import packed_arguments
from glora_llm.models.resolve import ResolvedModel
from glora_llm.models.tokenizer import pad_id
from glora_llm.schema import Recipe
from glora_llm.tasks.text import TextTask, means, text_task
from glora_llm.training.batch import Batch
from glora_llm.training.option_objective import OptionObjective


@dataclass(frozen=True)
class ChoiceTask(TextTask):
    """A causal language model on records with options. See `tasks.task.Task` for what the methods are for."""

    def batch(self, rows: TokenSet, indices: list[int]) -> Batch:
        """Return held-out rows with all their options, training rows with the right one."""
        found = [rows.row(index) for index in indices]
        if not found[0].option_lengths:
            return super().batch(rows, indices)
        return collate_options(found, pad_id(self.tokenizer))

    def targets(self, rows: TokenSet, index: int) -> int:
        """Return the target tokens of the right option of a row."""
        row = rows.row(index)
        if not row.option_lengths:
            return super().targets(rows, index)
        bounds = [*row.starts, len(row.tokens)]
        return int(row.targets[bounds[row.right] : bounds[row.right + 1]].sum())

    def objective(self, model: nn.Module) -> OptionObjective:
        """Return the summed cross entropy of the target tokens of right options."""
        config: Any = model.config
        return OptionObjective(model, partial(packed_arguments, config._attn_implementation))

    def means(self, table: Tensor, split: str) -> dict[str, float]:
        """Return the scores of the right options as answers, and how often they are the most likely ones."""
        scores = means(table, split, answers=True, labels=False)
        choices = {"accuracy": table[:, 4], "accuracy_norm": (table[:, 5] == table[:, 6]).double()}
        return scores | {f"{split}/{name}": float(column.mean()) for name, column in choices.items()}


def choice_task(recipe: Recipe, weights: bool) -> tuple[ResolvedModel, ChoiceTask]:
    """Return the base model of a recipe and its task, with the data prepared; arguments and errors as `text_task`."""
    base, task = text_task(recipe, weights)
    return base, ChoiceTask(recipe, task.tokenizer, task.data)
