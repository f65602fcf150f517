"""Multiple choice by likelihood: the loss of the right option, and whether it is the most likely one.

Letters: R rows, S options of all rows, C most options of a row, N target tokens, M target tokens of right options.
"""

from typing import Any

import torch
from torch import Tensor

from glora_llm.training.batch import Batch
from glora_llm.training.objectives import CausalLMObjective, TokenScores


class OptionObjective(CausalLMObjective):
    """A causal language model whose batches may hold all options of each row (`data.option_batch`).

    Training batches hold the right options alone, and are those of `CausalLMObjective`.
    """

    def forward(  # type: ignore[override]  # one batch in two forms; its keys are those of the base or more
        self, *, score: bool = False, **batch: Any
    ) -> Tensor | TokenScores:
        """Return the sum of -log p over the target tokens of the right options; or, to `score`, their scores.

        `among_labels` of the scores tells whether the row's right option has the highest log-likelihood, `predicted`
        names the one that has it once each is divided by the option's characters (lm-eval's acc and acc_norm; the
        first of equal ones is taken), `reference` the right one, as numbers in the row.
        """
        if "option_table" not in batch:
            return super().forward(**batch, score=score)
        names = ("target_option", "is_scored", "option_table", "option_lengths", "right_options")
        options = {name: batch.pop(name) for name in names}
        right_targets, right_rows = batch.pop("right_targets"), batch.pop("right_rows")
        if not score:
            batch |= {name: batch[name][right_targets] for name in ("target_index", "targets")}
            return super().forward(**batch)
        every = super().forward(**batch, score=True)
        assert isinstance(every, TokenScores)
        by_sum, by_length, right = _chosen(every.loss, **options)
        return TokenScores(
            right_rows,
            every.loss[right_targets],
            every.correct[right_targets],
            (by_sum == right)[right_rows],
            by_length[right_rows],
            right[right_rows],
        )

    def targets(self, batch: Batch) -> int:
        """Return the number of target tokens that the loss is summed over."""
        return len(batch["right_targets"] if "right_targets" in batch else batch["targets"])


def _chosen(
    loss: Tensor,
    target_option: Tensor,
    is_scored: Tensor,
    option_table: Tensor,
    option_lengths: Tensor,
    right_options: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the numbers (R) of the likeliest options: by log-likelihood, by that a character; and of the right."""
    likelihood = torch.zeros(len(option_lengths), dtype=torch.float64, device=loss.device)
    likelihood.index_add_(0, target_option, -(loss * is_scored).double())
    chosen = [
        values[option_table.clamp(min=0)].masked_fill(option_table < 0, -torch.inf).argmax(1)
        for values in (likelihood, likelihood / option_lengths)
    ]
    return chosen[0], chosen[1], right_options - option_table[:, 0]
