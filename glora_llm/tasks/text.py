"""Text: packed rows of tokens, causal language models, loss, perplexity and exact match."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glora_llm.atomic import cache_root
from glora_llm.data.batch import collate, collate_joined
from glora_llm.data.prepare import Prepared, prepare
from glora_llm.data.report import Report
from glora_llm.data.store import TokenSet
from glora_llm.models.resolve import ResolvedModel, resolve
from glora_llm.models.tokenizer import load_tokenizer, pad_id
from glora_llm.schema import Recipe
from glora_llm.tasks.new_text import new_text_model
from glora_llm.tasks.task import Batch
from glora_llm.training.objectives import CausalLMObjective, LabelTrie

ANSWER_FORMATS = ("classification", "alpaca", "prompt_completion", "chat")
MOST_COMPARED = 1024  # tokens by which a merged model is compared


@dataclass(frozen=True)
class TextTask:
    """A causal language model on prepared tokens. See `tasks.task.Task` for what the methods are for."""

    recipe: Recipe
    tokenizer: Any
    data: Prepared
    unit: str = "tokens"
    scored: str = "tokens"
    causal: bool = True

    @property
    def train(self) -> TokenSet:
        """The training rows."""
        return self.data.train

    @property
    def validation(self) -> TokenSet | None:
        """The rows that choices are made by."""
        return self.data.validation

    @property
    def test(self) -> TokenSet | None:
        """The rows that judge."""
        return self.data.test

    @property
    def reports(self) -> dict[str, Report]:
        """What preparation did to each split."""
        return self.data.reports

    @property
    def previews(self) -> list[str]:
        """Some samples, each with its targets marked."""
        return [f"targets marked: {text}" for text in self.data.previews]

    @property
    def has_answers(self) -> bool:
        """Whether the samples are answers, so that exact match means something."""
        return self.recipe.data.format in ANSWER_FORMATS

    def batch(self, rows: TokenSet, indices: list[int]) -> Batch:
        """Return rows as the tensors of one forward pass."""
        return collate([rows.row(index) for index in indices], pad_id(self.tokenizer))

    def training_batch(self, indices: list[int], step: int, place: int) -> Batch:
        """Return training rows as one micro batch; nothing in it is random."""
        always = self.recipe.model.attention == "flash_attention_2"
        return collate_joined([self.train.row(index) for index in indices], pad_id(self.tokenizer), always)

    def targets(self, rows: TokenSet, index: int) -> int:
        """Return the target tokens of a row."""
        return int(rows.row(index).targets.sum())

    def objective(self, model: nn.Module) -> CausalLMObjective:
        """Return the summed cross entropy of the target tokens."""
        labels = self.data.label_sequences
        return CausalLMObjective(model, LabelTrie.build(labels) if labels else None)

    def means(self, table: Tensor, split: str) -> dict[str, float]:
        """Return loss, perplexity and token accuracy; of answers exact match, of label words their accuracy."""
        return means(table, split, self.has_answers, self.data.label_sequences is not None)

    def comparison(self, rows: TokenSet, order: list[int]) -> list[Batch]:
        """Return up to 1,024 tokens, a row a batch."""
        batches: list[Batch] = []
        tokens = 0
        for index in order:
            if tokens >= MOST_COMPARED:
                break
            batch = {name: tensor[:, : MOST_COMPARED - tokens] for name, tensor in self.batch(rows, [index]).items()}
            batches.append(batch)
            tokens += batch["input_ids"].numel()
        return batches

    def answers(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits of every token (T, V), and the losses of the target tokens."""
        out = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits.float()
        goals = batch["labels"][0, 1:]
        losses = torch.nn.functional.cross_entropy(out[0, :-1], goals, reduction="none")
        return out[0].cpu(), losses[goals != -100].cpu()

    def save_preprocessing(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.tokenizer.save_pretrained(folder)


def text_task(recipe: Recipe, weights: bool) -> tuple[ResolvedModel, TextTask]:
    """Return the base model of a recipe (a new one has no weights yet) and its task, with the data prepared.

    Args:
        weights: False leaves the weights of a hub model where they are.

    Raises:
        UserError: for a model or data that do not fit the recipe, or each other.
    """
    base = new_text_model(recipe) if recipe.model.config else resolve(recipe.model, weights)
    tokenizer = load_tokenizer(base.folder)
    data = prepare(recipe.data, tokenizer, cache_root() / "data", recipe.training.seed)
    return base, TextTask(recipe, tokenizer, data)


def means(table: Tensor, prefix: str, answers: bool, labels: bool) -> dict[str, float]:
    """Return the scores of a table of `score_rows`, named `prefix/...`.

    Args:
        answers: rows are answers, so exact match (all target tokens right in greedy decoding) means something.
        labels: rows are label words, so accuracy among them does.
    """
    loss = float(table[:, 0].sum() / table[:, 1].sum())
    scores = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "token_accuracy": float(table[:, 2].sum() / table[:, 1].sum()),
    }
    if answers:
        scores["exact_match"] = float(table[:, 3].mean())
    if labels:
        scores["label_accuracy"] = float(table[:, 4].mean())
    return {f"{prefix}/{name}": value for name, value in scores.items()}
