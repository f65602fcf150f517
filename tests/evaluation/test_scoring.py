"""Scores depend neither on the batch size nor on the number of ranks, and are the ones that a hand would compute."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from glora_llm.data.batch import collate
from glora_llm.data.label_trie import LabelTrie
from glora_llm.data.store import Row
from glora_llm.evaluation.scoring import score_rows
from glora_llm.tasks.text import means
from glora_llm.training.objectives import CausalLMObjective, TokenScores

WORDS = [[3, 4, 1], [3, 5, 1], [6, 1]]
TRIE = LabelTrie.build(WORDS)
LENGTHS = [5, 9, 4, 9, 7, 12, 3, 5, 5, 8, 10, 4, 6]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Prompts of random tokens, each with a label word as its targets."""
    generator = np.random.default_rng(0)
    made = []
    for number, length in enumerate(LENGTHS):
        word = WORDS[number % len(WORDS)]
        prompt = generator.integers(0, 12, length)
        made.append(Row(np.array([*prompt, *word], dtype=np.int32), np.arange(length + len(word)) >= length, [0]))
    return made


@pytest.fixture(scope="module")
def objective() -> CausalLMObjective:
    """A model of 12 tokens in float64, so that sums in another order differ by nothing that counts."""
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, vocab_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, use_cache=False,
    )  # fmt: skip
    return CausalLMObjective(LlamaForCausalLM(config).double()).eval()


def table_of(
    rows: list[Row], score: Callable[[dict[str, Tensor]], Any], batch: int, rank: int = 0, world: int = 1
) -> Tensor:
    lengths = [len(row.tokens) for row in rows]
    return score_rows(
        lengths, lambda indices: collate([rows[i] for i in indices], 2, TRIE), score, lambda table: table, batch,
        rank, world,
    )  # fmt: skip


def scored(objective: CausalLMObjective) -> Callable[[dict[str, Tensor]], Any]:
    return lambda batch: objective(**batch, score=True)


@torch.no_grad()
def by_hand(objective: CausalLMObjective, row: Row) -> list[float]:
    """Return a row of the table from one forward pass of transformers over that row alone; no bytes are counted."""
    ids = torch.from_numpy(row.tokens.astype(np.int64))
    logits = objective.model(input_ids=ids[None]).logits[0, :-1]
    wanted = torch.from_numpy(row.targets)[1:]
    logits, goals = logits[wanted], ids[1:][wanted]
    right = (logits.argmax(-1) == goals).tolist()
    loss = -float(logits.log_softmax(-1)[range(len(goals)), goals].sum())
    by_label, chosen = [], []
    for place, goal in enumerate(goals.tolist()):
        allowed = sorted({word[place] for word in WORDS if word[:place] == goals.tolist()[:place]})
        chosen.append(int(logits[place, allowed].argmax()))
        by_label.append(allowed[chosen[-1]] == goal)
    reference = sorted({word[0] for word in WORDS}).index(int(goals[0]))
    return [loss, len(goals), sum(right), all(right), all(by_label), chosen[0], reference, 0]


@pytest.mark.parametrize(("batch", "world"), list(itertools.product([1, 3, 8, 100], [1, 2, 3, 5])))
def test_batch_size_and_ranks_change_nothing(
    batch: int, world: int, rows: list[Row], objective: CausalLMObjective
) -> None:
    calls: list[int] = []

    def counted(given: dict[str, Tensor]) -> Any:
        calls[-1] += 1
        return scored(objective)(given)

    tables = []
    for rank in range(world):
        calls.append(0)
        tables.append(table_of(rows, counted, batch, rank, world))
    expected = torch.tensor([by_hand(objective, row) for row in rows], dtype=torch.float64)
    table = torch.stack(tables).sum(0)
    torch.testing.assert_close(table[:, 0], expected[:, 0], rtol=1e-6, atol=1e-6)
    assert torch.equal(table[:, 1:], expected[:, 1:])
    assert len(set(calls)) == 1, "a rank that scores less often would leave the others waiting"
    assert 0 < expected[:, 4].sum() < len(rows) and 0 < expected[:, 2].sum() < expected[:, 1].sum()


def test_one_rank_fills_its_own_rows_only(rows: list[Row], objective: CausalLMObjective) -> None:
    tables = [table_of(rows, scored(objective), 3, rank, world=2) for rank in range(2)]
    assert not ((tables[0][:, 1] > 0) & (tables[1][:, 1] > 0)).any()


def test_the_sum_over_ranks_is_what_is_returned(rows: list[Row], objective: CausalLMObjective) -> None:
    plain = table_of(rows, scored(objective), 4)
    doubled = score_rows(
        [len(row.tokens) for row in rows], lambda indices: collate([rows[i] for i in indices], 2, TRIE),
        scored(objective), lambda table: 2 * table, 4,
    )  # fmt: skip
    assert torch.equal(doubled, 2 * plain)


def test_a_table_by_hand() -> None:
    """Two rows of three and one target; one target of the first is wrong, though right among the labels."""

    def score(batch: dict[str, Tensor]) -> TokenScores:
        where = batch["row"]
        first = where == 0
        loss = torch.where(first, torch.tensor(0.5), torch.tensor(2.0))
        right = torch.tensor([True, False, True, True])[: len(where)] if first.any() else torch.tensor([True])
        return TokenScores(torch.zeros_like(where) if len(where) < 4 else where, loss, right, torch.ones_like(right))

    def batch(indices: list[int]) -> dict[str, Tensor]:
        return {"row": torch.tensor([i for i in sorted(indices) for _ in range(3 if i == 0 else 1)])}

    expected = [[1.5, 3, 2, 0, 1, 0, 0, 0], [2.0, 1, 1, 1, 1, 0, 0, 0]]
    for size in (1, 2):
        assert score_rows([3, 7], batch, score, lambda table: table, size).tolist() == expected


TABLE = torch.tensor(
    # loss, targets, correct, all correct, all correct among the labels
    [[1.0, 2, 2, 1, 1], [6.0, 4, 1, 0, 1], [0.5, 1, 0, 0, 0], [0.5, 3, 3, 1, 1]], dtype=torch.float64
)  # fmt: skip


def test_means_by_hand() -> None:
    """Loss and token accuracy weigh every target alike, exact match and label accuracy every row."""
    assert means(TABLE, "test", answers=True, labels=True) == pytest.approx(
        {"test/loss": 8 / 10, "test/perplexity": math.exp(0.8), "test/token_accuracy": 6 / 10,
         "test/exact_match": 2 / 4, "test/label_accuracy": 3 / 4}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("answers", "labels", "more"),
    [(False, False, set()), (True, False, {"exact_match"}), (False, True, {"label_accuracy"})],
)
def test_scores_that_mean_nothing_are_left_out(answers: bool, labels: bool, more: set[str]) -> None:
    names = {name.removeprefix("validation/") for name in means(TABLE, "validation", answers, labels)}
    assert names == {"loss", "perplexity", "token_accuracy"} | more


def test_a_hopeless_loss_overflows_nothing() -> None:
    table = torch.tensor([[5000.0, 1, 0, 0, 0]], dtype=torch.float64)
    assert means(table, "test", answers=False, labels=False)["test/perplexity"] == pytest.approx(math.exp(700))
