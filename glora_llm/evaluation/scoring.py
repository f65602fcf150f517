"""Scores of a set of rows that depend neither on the batch size nor on the number of processes.

Each process fills the rows that it scored into one table; the tables are summed, and the means are taken over the whole
table in row order.
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from glora_llm.atomic import write_text
from glora_llm.errors import UserError
from glora_llm.evaluation.generation import answer_splits
from glora_llm.evaluation.trained import load_adapted, load_merged, whole_model
from glora_llm.failpoints import reach
from glora_llm.plan.elsewhere import recipe_for_scores
from glora_llm.plan.genome import deployed
from glora_llm.plan.plan import Plan, make_plan, require_same_base
from glora_llm.plan.run_folder import RunFolder
from glora_llm.plan.trained_weights import trained_weights
from glora_llm.report.summary import print_scores
from glora_llm.tasks.task import COLUMNS, Rows
from glora_llm.training.batch import Batch, to_device


class Passes(NamedTuple):
    """The passes of a model that a search asks for.

    Where parameters are sharded, all processes call them equally often.
    """

    score: Callable[[Batch], Any]  # batch -> TokenScores
    loss: Callable[[Batch], torch.Tensor]  # batch -> summed loss with its graph


def score_rows(
    lengths: Sequence[int],
    make_batch: Callable[[list[int]], Batch],
    score: Callable[[Batch], Any],
    gather: Callable[[Tensor], Tensor],
    batch_size: int,
    process_rank: int = 0,
    world_size: int = 1,
    title: str = "",
) -> Tensor:
    """Score every row once, over all processes.

    Args:
        lengths: tokens of each row; rows of like length share a batch.
        make_batch: row indices -> batch.
        score: batch -> TokenScores of its target tokens.
        gather: sums a float64 tensor over processes.
        title: what the progress bar says; none: no bar.

    Returns:
        (rows, C) float64, the columns of `tasks.task.COLUMNS`.
    """
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    table = torch.zeros(len(lengths), len(COLUMNS), dtype=torch.float64)
    rounds = math.ceil(len(batches) / world_size)
    for turn in tqdm(range(rounds), desc=title, disable=None if title and process_rank == 0 else True, leave=False):
        mine = turn * world_size + process_rank
        rows = batches[mine] if mine < len(batches) else batches[-1]
        reach("evaluation.before_batch")
        scores = score(make_batch(rows))
        if mine < len(batches):
            _fill(table, rows, scores)
    reach("evaluation.after")
    return gather(table)


def _fill(table: Tensor, rows: list[int], scores: Any) -> None:
    columns = [scores.row, scores.loss, torch.ones_like(scores.loss), scores.correct, scores.among_labels]
    columns += [torch.zeros_like(scores.loss) if one is None else one for one in (scores.predicted, scores.reference)]
    values = torch.stack([column.double() for column in columns]).cpu()  # one read from the device
    row = values[0].long()
    sums = values.new_zeros(4, len(rows)).index_add_(1, row, values[1:5])
    loss, targets, correct, among_labels = sums
    table[rows, :5] = torch.stack([loss, targets, correct, correct == targets, among_labels == targets], dim=1)
    # A row is answered at the first target that has an answer; one without any gets the column of zeros at the end.
    count = values.shape[1]
    places = torch.where(values[6].isnan(), count, torch.arange(count))
    first = torch.full((len(rows),), count).scatter_reduce_(0, row, places, "amin")
    table[rows, 5:7] = torch.cat([values[5:], values.new_zeros(2, 1)], dim=1)[:, first].T


def score_chosen(
    plan: Plan,
    rows: Rows,
    numbers: Sequence[int],
    score: Callable[[Batch], Any],
    gather: Callable[[Tensor], Tensor] = lambda table: table,
    process_rank: int = 0,
    world_size: int = 1,
    title: str = "",
) -> Tensor:
    """Score the rows of these numbers; training, evaluation and search all score here.

    Args:
        rows: of the plan's task.
        numbers: which of them, in the order of the result.
        score, gather, process_rank, world_size, title: as of `score_rows`; without them one process scores alone.

    Returns:
        the table of `score_rows`, (len(numbers), C).
    """
    lengths, text_bytes = rows.lengths(), rows.text_bytes()
    table = score_rows(
        [int(lengths[number]) for number in numbers],
        lambda indices: plan.batch(rows, [numbers[index] for index in indices]),
        score,
        gather,
        plan.recipe.evaluation.batch,
        process_rank,
        world_size,
        title,
    )
    if text_bytes is not None:
        table[:, COLUMNS.index("text_bytes")] = torch.from_numpy(text_bytes[list(numbers)]).double()
    return table


def score_split(
    plan: Plan,
    split: str,
    score: Callable[[Batch], Any],
    gather: Callable[[Tensor], Tensor] = lambda table: table,
    process_rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    rows_file: Path | None = None,
) -> dict[str, float]:
    """Return the scores of a split's rows, named `SPLIT/...`; of `test` those of each test set, `test/NAME/...`.

    Args:
        score, gather, process_rank, world_size: as of `score_rows`.
        limit: of rows, in a seeded order; None: all.
        rows_file: the first process writes the table there, in the order of the rows; None: nothing is written.

    Raises:
        UserError: when the recipe has no such rows.
    """
    scores: dict[str, float] = {}
    digests: list[str] = []
    values: list[list[float]] = []
    for name in plan.splits(split):
        rows = plan.rows(name)
        if rows is None:
            raise UserError(f"The recipe has no {split} rows: set data.{split}.")
        numbers = plan.choice(rows, limit)
        table = score_chosen(plan, rows, numbers, score, gather, process_rank, world_size, title=name)
        scores |= plan.task.means(table, name)
        if rows_file is not None and process_rank == 0:
            digests.append(rows.digest())
            values += [row for _, row in sorted(zip(numbers, table.tolist(), strict=True))]
    if rows_file is not None and process_rank == 0:
        write_text(rows_file, json.dumps({"rows": "+".join(digests), "scores": values}) + "\n")
    return scores


def score_model(plan: Plan, model: Any, split: str) -> dict[str, float]:
    """Return the scores of a model on one split, in this process alone; of generated answers too, where asked for.

    Raises:
        UserError: when the recipe has no such rows.
    """
    scores = score_split(plan, split, passes_of(plan, model).score)
    return scores | answer_splits(plan, model, split)[0] if plan.recipe.evaluation.generate else scores


def passes_of(plan: Plan, model: Any) -> Passes:
    """Return what a search asks of a model, in this process alone."""
    objective = plan.task.objective(model).eval()

    def score(batch: Batch) -> Any:
        with torch.no_grad():
            return objective(**to_device(batch, model.device), score=True)

    return Passes(score, lambda batch: objective(**to_device(batch, model.device)))


def evaluate_run(
    folder: RunFolder, split: str, merged: Path | None, genome: Path | None = None, step: int | None = None
) -> None:
    """Score what a run trained, or its merged model, on one split, and print the scores.

    Args:
        folder: of the run; its overrides may say where the data are.
        merged: score the model of this folder instead.
        genome: of a supernet; None: RUN/genome.json.
        step: score this kept checkpoint; None: the end of the run.

    Raises:
        UserError: when the folder is no run, what it trained is gone or damaged, or there are no such rows.
    """
    if merged:
        if step is not None:
            raise UserError(f"--merged scores {merged}, and --step a checkpoint of {folder.path}: give one of them.")
        plan = make_plan(recipe_for_scores(folder, folder.recipe(), split))
        print_scores(score_model(plan, load_merged(merged), split))
        return
    weights, checkpoint = trained_weights(folder, step)
    recipe, adapter = deployed(folder, weights, genome)
    plan = make_plan(recipe_for_scores(folder, recipe, split))
    if folder.base():
        require_same_base(folder, plan)
    whole = whole_model(plan, folder.model, checkpoint) if recipe.adapter.is_full else nullcontext(adapter)
    with whole as trained:
        print_scores(score_model(plan, load_adapted(plan, trained), split))
