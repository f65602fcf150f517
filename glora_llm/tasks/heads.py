"""Classes and numbers by a head: prompts, a sequence classifier, cross entropy or squared error."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glora_llm.atomic import cache_root
from glora_llm.data.prepare import Prepared, prepare
from glora_llm.data.report import Report
from glora_llm.data.store import Row, TokenSet
from glora_llm.errors import UserError
from glora_llm.models.config_file import load_config
from glora_llm.models.families import looks_both_ways
from glora_llm.models.resolve import ResolvedModel, resolve
from glora_llm.models.sequence_classifier import with_text_head
from glora_llm.models.tokenizer import load_tokenizer, pad_id
from glora_llm.schema import Recipe
from glora_llm.tasks.metrics import CLASS_METRICS, NUMBER_METRICS, scores_of, wanted_metrics
from glora_llm.tasks.task import OnPreparedData
from glora_llm.training.batch import Batch
from glora_llm.training.head_objective import HeadObjective

MOST_COMPARED, COMPARED_AT_ONCE = 64, 16  # samples by which a merged model is compared
USUAL = {"classification": ("accuracy",), "regression": ("pearson", "spearman")}


@dataclass(frozen=True)
class HeadTask(OnPreparedData[TokenSet, Report]):
    """A sequence classifier on prompts. See `tasks.task.Task` for what the methods are for.

    Args:
        causal: attention sees what came before alone; the last token answers. Else an encoder, which is given a mask.
        metrics: scores beside the loss.
    """

    recipe: Recipe
    tokenizer: Any
    data: Prepared
    causal: bool
    metrics: tuple[str, ...]
    unit: str = "tokens"
    scored: str = "samples"

    @property
    def is_regression(self) -> bool:
        """True where the head has one output, a number."""
        return self.recipe.head == "regression"

    def batch(self, rows: TokenSet, indices: list[int]) -> Batch:
        """Return `input_ids` (B, T) int64, padded on the right, `labels` (B) float32, and an encoder's mask (B, T)."""
        return self._collate([rows.row(index) for index in indices])

    def training_batch(self, indices: list[int], step: int, place: int) -> Batch:
        """Return training rows as one micro batch; nothing in it is random."""
        return self.batch(self.train, indices)

    def targets(self, rows: TokenSet, index: int) -> int:
        """Return 1: every sample counts the same."""
        return 1

    def objective(self, model: nn.Module) -> HeadObjective:
        """Return the summed cross entropy of the classes, or squared error of the numbers."""
        return HeadObjective(model, self.is_regression)

    def means(self, table: Tensor, split: str) -> dict[str, float]:
        """Return the mean loss, and the scores that the recipe asks for."""
        scores = {"loss": float(table[:, 0].mean())} | scores_of(table, self.metrics)
        return {f"{split}/{name}": value for name, value in scores.items()}

    def comparison(self, rows: TokenSet, order: list[int]) -> tuple[list[Batch], int]:
        """Return up to 64 samples in batches of 16, and how many they are."""
        chosen = order[:MOST_COMPARED]
        starts = range(0, len(chosen), COMPARED_AT_ONCE)
        return [self.batch(rows, chosen[start : start + COMPARED_AT_ONCE]) for start in starts], len(chosen)

    def answers(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits (B, C), and the loss of each sample."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits.float()
        losses, _ = HeadObjective(model, self.is_regression).losses(logits, batch["labels"])
        return logits.cpu(), losses.cpu()

    def save_preprocessing(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.tokenizer.save_pretrained(folder)

    def _collate(self, rows: Sequence[Row]) -> Batch:
        width = max(len(row.tokens) for row in rows)
        ids = np.full((len(rows), width), pad_id(self.tokenizer), dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row.tokens)] = row.tokens
            mask[number, : len(row.tokens)] = 1
        labels = [row.label or 0.0 for row in rows]  # the sample that a merge is compared by has none
        batch = {"input_ids": torch.from_numpy(ids), "labels": torch.tensor(labels, dtype=torch.float32)}
        # Padding comes after all that a causal model's last token sees.
        return batch if self.causal else batch | {"attention_mask": torch.from_numpy(mask)}


def head_task(recipe: Recipe, weights: bool) -> tuple[ResolvedModel, HeadTask]:
    """Return the base model of a recipe with its new head, and its task, with the data prepared.

    Args:
        weights: False leaves the weights of a hub model where they are.

    Raises:
        UserError: for a model or data that do not fit the recipe, or each other.
    """
    if recipe.model.config is not None:
        raise UserError(
            f"task {recipe.head} puts a head on a model that is there, and model.config makes a new one: set "
            "model.name_or_path, or train the new model first."
        )
    plain = resolve(recipe.model, weights, "classification")
    tokenizer, seed = load_tokenizer(plain.folder), recipe.training.seed
    data = prepare(recipe.data, tokenizer, cache_root() / "data", seed, head=True)
    kind = "regression" if data.classes is None else "classification"
    has = ["loss", *(CLASS_METRICS if data.classes else NUMBER_METRICS)]
    metrics = wanted_metrics(recipe, has, f"a head of {kind}") or USUAL[kind]
    if data.classes is not None and len(data.classes) < 2:
        raise UserError(
            f"A head tells classes apart, and the data name one alone ({data.classes[0]}): see data.labels."
        )
    base = with_text_head(plain, data.classes, pad_id(tokenizer), seed, weights)
    config = load_config(plain.folder)
    causal = not looks_both_ways(config.to_dict())
    most = getattr(config, "max_position_embeddings", None)
    if not causal and most is not None and recipe.data.max_tokens > most:
        raise UserError(
            f"data.max_tokens is {recipe.data.max_tokens}, and '{plain.name}' has {most} positions: set "
            f"data.max_tokens={most} or less."
        )
    return base, HeadTask(recipe, tokenizer, data, causal, metrics)
