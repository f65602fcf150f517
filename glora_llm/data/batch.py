"""Rows -> the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from glora_llm.data.store import Row

if TYPE_CHECKING:
    import torch

IGNORED = -100
MOST_PADDING = 0.1  # share of a batch
LONGEST_JOINED = 4096  # tokens: attention within one row costs its square


def collate(rows: Sequence[Row], pad_id: int) -> dict[str, torch.Tensor]:
    """Return the rows as one batch, as wide as its longest row; the rest is padding, told apart by length alone.

    The model gets `input_ids` and `position_ids` and no attention mask: positions that start again at 0 tell
    transformers where a sample begins, but only when it keeps no cache (`use_cache=False`). Padding comes after all
    that is read, so the causal mask hides it.

    Args:
        pad_id: any id of the vocabulary, that of an end token too.

    Returns:
        `input_ids` (B, T) int64; `position_ids` (B, T) int64, 0 at the first token of every sample; `labels` (B, T)
        int64, aligned with `input_ids` (not shifted), -100 where nothing is learnt.
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
        for start, stop in zip(row.starts, [*row.starts[1:], shape[1]], strict=True):
            positions[n, start:stop] = np.arange(stop - start)
    arrays = {"input_ids": input_ids, "position_ids": positions, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def collate_joined(rows: Sequence[Row], pad_id: int, always: bool = False) -> dict[str, torch.Tensor]:
    """Return the same samples as `collate`, end to end in one row without padding, where that saves work.

    Args:
        always: join whatever it saves. flash_attention_2 needs it: there, transformers sees where samples begin only
            in a batch of one row.
    """
    lengths = [len(row.tokens) for row in rows]
    padding = 1 - sum(lengths) / (len(rows) * max(lengths))
    if always or (padding > MOST_PADDING and sum(lengths) <= LONGEST_JOINED):
        rows = [join(rows)]
    return collate(rows, pad_id)


def join(rows: Sequence[Row]) -> Row:
    """Return several rows as one; its samples begin where theirs did."""
    offsets = np.cumsum([0, *(len(row.tokens) for row in rows[:-1])]).tolist()
    starts = [offset + start for offset, row in zip(offsets, rows, strict=True) for start in row.starts]
    return Row(np.concatenate([row.tokens for row in rows]), np.concatenate([row.targets for row in rows]), starts)
