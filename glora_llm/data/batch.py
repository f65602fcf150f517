"""Rows -> the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from glora_llm.data.store import Row

if TYPE_CHECKING:
    import torch

IGNORED = -100


class Batch(NamedTuple):
    """One micro batch. Call the model with `model_inputs()`: positions that start again at 0 tell transformers where a
    sample begins, but only when it gets no attention mask and keeps no cache.

    Attributes:
        input_ids: (B, T) int64.
        position_ids: (B, T) int64; 0 at the first token of every sample and of the padding.
        labels: (B, T) int64, aligned with `input_ids` (not shifted); -100 where nothing is learnt.
        n_targets: labels that are not -100.
        n_tokens: tokens that are not padding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    n_targets: int
    n_tokens: int

    def model_inputs(self) -> dict[str, Any]:
        """Return the arguments of the model's call with which no sample of a row sees another."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Return the rows as one batch, as wide as its longest row; the rest is padding, told apart by length alone.

    Args:
        pad_id: any id of the vocabulary, that of an end token too.
    """
    import torch

    shape = (len(rows), max(len(row.tokens) for row in rows))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for n, row in enumerate(rows):
        length = len(row.tokens)
        input_ids[n, :length] = row.tokens
        labels[n, :length] = np.where(row.targets, row.tokens, IGNORED)
        labels[n, row.starts] = IGNORED
        for start, stop in zip([*row.starts, length], [*row.starts[1:], length, shape[1]], strict=True):
            positions[n, start:stop] = np.arange(stop - start)
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(positions),
        torch.from_numpy(labels),
        n_targets=int((labels != IGNORED).sum()),
        n_tokens=sum(len(row.tokens) for row in rows),
    )


def flatten(batch: Batch) -> Batch:
    """Return the batch as one row (1, B T), the same samples: for flash_attention_2.

    There, transformers sees where samples begin only in a batch of one row; with more rows, samples packed in one row
    would attend to each other.
    """
    return batch._replace(
        input_ids=batch.input_ids.reshape(1, -1),
        position_ids=batch.position_ids.reshape(1, -1),
        labels=batch.labels.reshape(1, -1),
    )
