"""Rows -> the tensors of one forward pass.

Letters: B rows, T tokens a row, N target tokens of the batch, S segments, C choices of a label's token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from glora_llm.data.label_trie import LabelTrie
from glora_llm.data.store import Row

MOST_PADDING = 0.1  # share of a batch
LONGEST_JOINED = 4096  # tokens: attention with a mask costs the square of a row


def collate(rows: Sequence[Row], pad_id: int, labels: LabelTrie | None = None) -> dict[str, Any]:
    """Return the rows as one batch, as wide as its longest row; the rest is padding, told apart by length alone.

    The model gets no attention mask. A sample is a segment of its row, attention stays inside of it, and the padding
    behind the last sample belongs to that one's segment: it comes after all that is read, so causal attention hides
    it. Everything that depends on where samples and targets stand is made here, on the CPU: looking for it on a GPU
    would wait for the GPU.

    Args:
        pad_id: any id of the vocabulary, that of an end token too.
        labels: the label words of a classification task, where accuracy among them is to be scored.

    Returns:
        `input_ids` (B, T) int64; `position_ids` (B, T) int64, 0 at the first token of every sample; `targets` (N)
        int64, the tokens that are predicted, in row order; `target_index` (N) int64, which of the B * T states
        predicts each (that of the token before it); `segment_lengths`, S ints that sum up to B * T;
        `segment_offsets` (S + 1) int32, where each segment begins in the B * T tokens, and their number; with
        `labels`, `label_choices` (N, C) int64 (see `LabelTrie.choices`).
    """
    import torch

    width = max(len(row.tokens) for row in rows)
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    lengths: list[int] = []
    learnt: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    for number, row in enumerate(rows):
        input_ids[number, : len(row.tokens)] = row.tokens
        lengths += [stop - start for start, stop in pairwise([*row.starts, width])]
        targets = row.targets.copy()
        targets[row.starts] = False  # nothing before the first token of a sample predicts it
        learnt.append(number * width + np.flatnonzero(targets))
    places = np.concatenate(learnt)
    arrays = {
        "input_ids": input_ids,
        "position_ids": np.concatenate([np.arange(length) for length in lengths]).reshape(input_ids.shape),
        "target_index": places - 1,
        "targets": input_ids.reshape(-1)[places],
        "segment_offsets": np.cumsum([0, *lengths], dtype=np.int32),
    }
    if labels is not None:
        words = [input_ids.reshape(-1)[part].tolist() for part in learnt]
        arrays["label_choices"] = np.concatenate([labels.choices(word) for word in words])
    batch: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return batch | {"segment_lengths": tuple(lengths)}


def collate_joined(rows: Sequence[Row], pad_id: int) -> dict[str, Any]:
    """Return the same samples as `collate`, end to end in one row without padding, where that saves work."""
    lengths = [len(row.tokens) for row in rows]
    padding = 1 - sum(lengths) / (len(rows) * max(lengths))
    if padding > MOST_PADDING and sum(lengths) <= LONGEST_JOINED:
        rows = [join(rows)]
    return collate(rows, pad_id)


def join(rows: Sequence[Row]) -> Row:
    """Return several rows as one; its samples begin where theirs did."""
    offsets = np.cumsum([0, *(len(row.tokens) for row in rows[:-1])]).tolist()
    starts = [offset + start for offset, row in zip(offsets, rows, strict=True) for start in row.starts]
    return Row(np.concatenate([row.tokens for row in rows]), np.concatenate([row.targets for row in rows]), starts)


def cut(row: Row, length: int) -> Row:
    """Return the first `length` tokens of a row."""
    return Row(row.tokens[:length], row.targets[:length], [start for start in row.starts if start < length])
