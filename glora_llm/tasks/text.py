"""Text: packed rows of tokens, causal language models, loss, perplexity and exact match."""

import math
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glora_llm.atomic import cache_root
from glora_llm.data.batch import collate, collate_joined, cut, join
from glora_llm.data.label_trie import LabelTrie
from glora_llm.data.prepare import Prepared, prepare
from glora_llm.data.report import Report
from glora_llm.data.store import Row, TokenSet
from glora_llm.errors import UserError
from glora_llm.models.attention import fetch_kernel, packed_arguments
from glora_llm.models.from_dense import made_of_dense
from glora_llm.models.resolve import ResolvedModel, resolve
from glora_llm.models.tokenizer import load_tokenizer, pad_id
from glora_llm.schema import Recipe
from glora_llm.tasks.metrics import CLASS_METRICS, scores_of, wanted_metrics
from glora_llm.tasks.new_text import new_text_model
from glora_llm.tasks.task import COLUMNS, OnPreparedData
from glora_llm.training.batch import Batch
from glora_llm.training.objectives import CausalLMObjective

ANSWER_FORMATS = ("classification", "alpaca", "prompt_completion", "chat")
MOST_COMPARED = 1024  # tokens by which a merged model is compared


@dataclass(frozen=True)
class TextTask(OnPreparedData[TokenSet, Report]):
    """A causal language model on prepared tokens. See `tasks.task.Task` for what the methods are for.

    Args:
        metrics: further scores of label words.
    """

    recipe: Recipe
    tokenizer: Any
    data: Prepared
    metrics: tuple[str, ...] = ()
    unit: str = "tokens"
    scored: str = "tokens"
    causal: bool = True

    @property
    def previews(self) -> list[str]:
        """Some samples, each with its label tokens marked."""
        return [f"label tokens marked: {text}" for text in self.data.previews]

    @cached_property
    def label_trie(self) -> LabelTrie | None:
        """The label words of a classification task."""
        words = self.data.label_sequences
        return LabelTrie.build(words) if words else None

    @cached_property
    def first_classes(self) -> list[int] | None:
        """The class of each token by which label words differ; None: no label words, or one token tells no class."""
        if self.label_trie is None:
            return None
        return self.label_trie.first_classes(self.data.label_sequences or [], self.data.label_classes or [])

    @property
    def has_answers(self) -> bool:
        """True where the samples are answers, so that exact match means something."""
        return self.recipe.data.format in ANSWER_FORMATS

    @property
    def is_running_text(self) -> bool:
        """True where every token of the raw text is learnt."""
        return self.recipe.data.format == "text"

    def batch(self, rows: TokenSet, indices: list[int]) -> Batch:
        """Return rows as the tensors of one forward pass."""
        return collate([rows.row(index) for index in indices], pad_id(self.tokenizer), self.label_trie)

    def training_batch(self, indices: list[int], step: int, place: int) -> Batch:
        """Return training rows as one micro batch; nothing in it is random."""
        return collate_joined([self.train.row(index) for index in indices], pad_id(self.tokenizer))

    def targets(self, rows: TokenSet, index: int) -> int:
        """Return the target tokens of a row."""
        return int(rows.row(index).targets.sum())

    def objective(self, model: nn.Module) -> CausalLMObjective:
        """Return the summed cross entropy of the target tokens."""
        config: Any = model.config
        return CausalLMObjective(model, partial(packed_arguments, config._attn_implementation))

    def means(self, table: Tensor, split: str) -> dict[str, float]:
        """Return loss, perplexity and token accuracy; of answers exact match, of label words their accuracy.

        Of running text the bits of a byte, by which tokenizers compare.
        """
        found = means(table, split, self.has_answers, self.data.label_sequences is not None)
        if self.is_running_text:
            found |= bits_per_byte(table, split)
        if self.data.label_sequences is None:
            return found
        own = scores_of(table, [name for name in self.metrics if name != "accuracy"], self.first_classes)
        if "accuracy" in self.metrics:  # needs no class of a wrong choice
            own = {"accuracy": found[f"{split}/label_accuracy"]} | own
        return found | {f"{split}/{name}": own[name] for name in self.metrics if name in own}

    def comparison(self, rows: TokenSet, order: list[int]) -> tuple[list[Batch], int]:
        """Return up to 1,024 tokens, end to end in one row, and of how many rows they are."""
        chosen: list[Row] = []
        room = MOST_COMPARED
        for index in order:
            if not room:
                break
            chosen.append(cut(rows.row(index), room))
            room -= len(chosen[-1].tokens)
        return [collate([join(chosen)], pad_id(self.tokenizer))], len(chosen)

    def answers(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits of every token (T, V), and the losses of the target tokens."""
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        logits = model(**inputs, use_cache=False).logits[0].float()
        losses = torch.nn.functional.cross_entropy(logits[batch["target_index"]], batch["targets"], reduction="none")
        return logits.cpu(), losses.cpu()

    def save_preprocessing(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.tokenizer.save_pretrained(folder)


def text_task(recipe: Recipe, weights: bool) -> tuple[ResolvedModel, TextTask]:
    """Return the base model of a recipe (a new one has no weights yet) and its task, with the data prepared.

    Args:
        weights: False leaves the weights of a hub model, and a kernel of the hub, where they are.

    Raises:
        UserError: for a model, kernel or data that do not fit the recipe, or each other.
    """
    base = new_text_model(recipe) if recipe.model.config else resolve(recipe.model, weights)
    fetch_kernel(recipe.model.attention, weights)
    tokenizer = load_tokenizer(base.folder)
    data = prepare(recipe.data, tokenizer, cache_root() / "data", recipe.training.seed)
    if recipe.model.from_dense is not None:
        first = range(min(len(data.train), recipe.model.from_dense.calibration_rows))
        base = made_of_dense(recipe.model, base, [data.train.row(n).tokens.tolist() for n in first], weights)
    return base, with_metrics(TextTask(recipe, tokenizer, data))


def with_metrics(task: TextTask) -> TextTask:
    """Return the task with the scores that its recipe asks for.

    Raises:
        UserError: for scores that it has not; for label words that F1 and Matthews correlation cannot tell apart.
    """
    labels = task.data.label_sequences is not None
    has = ["loss", "perplexity", "token_accuracy", *(["exact_match"] if task.has_answers else [])]
    has += ["bits_per_byte"] if task.is_running_text else []
    has += ["label_accuracy", *CLASS_METRICS] if labels else []
    has += ["accuracy", "accuracy_norm"] if task.recipe.data.format == "multiple_choice" else []
    has += ["number_match"] if task.recipe.evaluation.generate else []
    what = "a classification by label words" if labels else f"format {task.recipe.data.format}"
    wanted = wanted_metrics(task.recipe, has, what)
    by_class = [name for name in wanted if name in CLASS_METRICS and name != "accuracy"]
    if by_class and task.first_classes is None:
        raise UserError(
            f"{by_class[0]} needs the class of every answer, and the label words {', '.join(task.data.classes or [])} "
            "do not all differ at one token: choose words in data.labels that begin with different tokens, or train a "
            "head: task=classification."
        )
    return replace(task, metrics=wanted)


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


def bits_per_byte(table: Tensor, prefix: str) -> dict[str, float]:
    """Return the loss of all rows in bits, over the UTF-8 bytes of the raw text that their targets stand for.

    It is the length of the text under the model, -log2 p of the tokens and of the end token of each document, so it
    compares models of different tokenizers. Nothing where no bytes are known.
    """
    size = float(table[:, COLUMNS.index("text_bytes")].sum())
    return {f"{prefix}/bits_per_byte": float(table[:, 0].sum()) / math.log(2) / size} if size else {}
