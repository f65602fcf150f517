"""Rows of multiple choice -> the tensors of one forward pass over all their options."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from glora_llm.data.batch import collate
from glora_llm.data.store import Row

NO_OPTION = -1


def collate_options(rows: Sequence[Row], pad_id: int) -> dict[str, Any]:
    """Return the options of R rows as one batch of `collate`, a sequence each, and what tells them apart.

    Args:
        rows: of held-out multiple choice.
        pad_id: any id of the vocabulary.

    Returns:
        the batch of all S options with N target tokens, and: `target_option` (N) int64, the option that a target
        belongs to; `is_scored` (N) bool, false at the end token, which is no part of an option; `option_table` (R, C)
        int64, the options of each row, `NO_OPTION` where it has fewer than C; `option_lengths` (S) float32,
        characters; `right_options` (R) int64; `right_targets` (M) int64, which targets are those of a right option;
        `right_rows` (M) int64, their rows.
    """
    import torch

    sequences = [
        Row(row.tokens[start:stop], row.targets[start:stop], [0])
        for row in rows
        for start, stop in pairwise([*row.starts, len(row.tokens)])
    ]
    batch = collate(sequences, pad_id)
    counts = [len(row.starts) for row in rows]
    firsts = np.cumsum([0, *counts])
    table = np.full((len(rows), max(counts)), NO_OPTION, dtype=np.int64)
    for number, count in enumerate(counts):
        table[number, :count] = firsts[number] + np.arange(count)
    right = np.array([table[number, row.right] for number, row in enumerate(rows)])
    target_option = batch["target_index"].numpy() // batch["input_ids"].shape[1]
    row_of_option = np.repeat(np.arange(len(rows)), counts)
    right_targets = np.flatnonzero(np.isin(target_option, right))
    arrays = {
        "target_option": target_option,
        "is_scored": np.append(target_option[1:] == target_option[:-1], False),  # the last one of an option is the end
        "option_table": table,
        "option_lengths": np.concatenate([row.option_lengths for row in rows]).astype(np.float32),
        "right_options": right,
        "right_targets": right_targets,
        "right_rows": row_of_option[target_option[right_targets]],
    }
    return batch | {name: torch.from_numpy(array) for name, array in arrays.items()}
