"""The loss of a head on a text model: cross entropy of each sample's class, or squared error of its number.

Letters: B samples, T tokens, C outputs of the head.
"""

from typing import Any

import torch
from torch import Tensor, nn

from glora_llm.training.batch import Batch
from glora_llm.training.objectives import TokenScores


class HeadObjective(nn.Module):
    """Wraps a sequence classifier for the engine: batch -> summed loss over its samples.

    Args:
        model: a transformers sequence classifier: `input_ids` (B, T) -> `logits` (B, C).
        regression: the head has one output, a number.
    """

    def __init__(self, model: nn.Module, regression: bool):
        super().__init__()
        self.model, self.regression = model, regression

    def forward(self, labels: Tensor, score: bool = False, **inputs: Tensor) -> Tensor | TokenScores:
        """Return the sum of -log p, or of squared errors, over the samples; or, to `score`, the scores of each.

        Args:
            labels: (B) float32, class numbers or numbers.
            inputs: `input_ids` (B, T), and of an encoder `attention_mask` (B, T).
        """
        losses, predicted = self.losses(self.model(**inputs).logits.float(), labels)
        if not score:
            return losses.sum()
        right = predicted == labels
        return TokenScores(torch.arange(len(labels), device=labels.device), losses, right, right, predicted, labels)

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each sample (B) and what the head answers (B), for logits (B, C) and labels (B)."""
        if self.regression:
            return (logits[:, 0] - labels) ** 2, logits[:, 0]
        losses = nn.functional.cross_entropy(logits, labels.long(), reduction="none")
        return losses, logits.argmax(-1).to(labels.dtype)

    def targets(self, batch: Batch) -> int:
        """Return the number of samples."""
        return len(batch["labels"])

    def extent(self, batch: Batch) -> tuple[int, int]:
        """Return the tokens of a batch, padding included, and the width of its rows."""
        ids: Any = batch["input_ids"]
        return ids.numel(), ids.shape[1]
