"""Scores of a set of rows that depend neither on the batch size nor on the number of ranks.

Each rank fills the rows that it scored into one table; the tables are summed, and the means are taken over the whole
table in row order.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

Batch = dict[str, Tensor]


def score_rows(
    lengths: Sequence[int],
    make_batch: Callable[[list[int]], Batch],
    score: Callable[[Batch], Any],
    gather: Callable[[Tensor], Tensor],
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    title: str = "",
) -> Tensor:
    """Score every row once, over all ranks.

    Args:
        lengths: tokens of each row; rows of like length share a batch.
        make_batch: row indices -> batch.
        score: batch -> TokenScores of its target tokens.
        gather: sums a float64 tensor over ranks.
        title: what the progress bar says; none: no bar.

    Returns:
        (rows, 5) float64: summed loss, targets, correct targets, all correct, all correct among label words.
    """
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    table = torch.zeros(len(lengths), 5, dtype=torch.float64)
    rounds = math.ceil(len(batches) / world)
    for turn in tqdm(range(rounds), desc=title, disable=None if title and rank == 0 else True, leave=False):
        mine = turn * world + rank
        rows = batches[mine] if mine < len(batches) else batches[-1]
        scores = score(make_batch(rows))
        if mine < len(batches):
            _fill(table, rows, scores)
    return gather(table)


def _fill(table: Tensor, rows: list[int], scores: Any) -> None:
    where = scores.row.cpu()
    columns = (scores.loss, torch.ones_like(scores.loss), scores.correct)
    for column, values in enumerate(columns):
        sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, where, values.double().cpu())
        table[rows, column] = sums
    for column, right in ((3, scores.correct), (4, scores.among_labels)):
        wrong = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, where, (~right).double().cpu())
        table[rows, column] = (wrong == 0).double()
