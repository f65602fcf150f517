"""What is minimised: the summed cross entropy of the target tokens. Only their logits are ever computed.

Letters: B rows, T tokens a row, N target tokens of the batch, H hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100
CHUNK = 4096  # target tokens whose logits exist at once


class Objective(Protocol):
    """What the engine and the loop ask of a model wrapped for training, beside its forward pass.

    Calling it with a batch gives the summed loss of the batch's targets, a float32 scalar; with `score=True` it gives
    `TokenScores`.
    """

    def targets(self, batch: dict[str, Tensor]) -> int:
        """Return what the loss of a batch is summed over; the mean of a step divides by the sum over its batches."""

    def extent(self, batch: dict[str, Tensor]) -> tuple[int, int]:
        """Return the tokens (or patches) that a batch computes, and how many of them attend to each other."""


class TokenScores(NamedTuple):
    """Scores of the targets of one batch (tokens, or images), in row order, (N) each."""

    row: Tensor  # int64, row of the batch
    loss: Tensor  # float32, -log p(target)
    correct: Tensor  # bool, the target is the most likely token
    among_labels: Tensor  # bool, the target is the most likely of the tokens that continue a label word


@dataclass
class LabelTrie:
    """Which tokens may follow each prefix of a label's token sequence."""

    next_tokens: dict[tuple[int, ...], list[int]]

    @classmethod
    def build(cls, sequences: list[list[int]]) -> "LabelTrie":
        """Make the trie of all label words, each given as its target tokens (the end token included)."""
        found: dict[tuple[int, ...], set[int]] = {}
        for sequence in sequences:
            for at, token in enumerate(sequence):
                found.setdefault(tuple(sequence[:at]), set()).add(token)
        return cls({prefix: sorted(tokens) for prefix, tokens in found.items()})


class CausalLMObjective(nn.Module):
    """Wraps a causal language model for the engine: batch -> summed loss over its target tokens.

    Rows are told apart by `position_ids` that start again at 0, so no attention mask is needed and no padding token is
    ever looked at: the padded tail is a segment of its own behind the last target.

    Args:
        model: a transformers causal LM (adapters injected) with a decoder and an output head.
        trie: the label words of a classification task; None where there are none.
    """

    def __init__(self, model: nn.Module, trie: LabelTrie | None = None):
        super().__init__()
        self.model, self.trie = model, trie

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, score: bool = False
    ) -> Tensor | TokenScores:
        """Return the sum of -log p over the target tokens, a float32 scalar; or, to `score`, the scores of each.

        Args:
            input_ids: (B, T).
            position_ids: (B, T), starting at 0 with every sample.
            labels: (B, T), -100 where there is no target; not shifted.
        """
        if score:
            return self._score(input_ids, position_ids, labels)
        hidden, targets, _ = self.target_states(input_ids, position_ids, labels)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(targets), CHUNK):
            part, goal = hidden[start : start + CHUNK], targets[start : start + CHUNK]
            if len(targets) > CHUNK and torch.is_grad_enabled():
                total = total + checkpoint(self._loss, part, goal, use_reentrant=False)
            else:
                total = total + self._loss(part, goal)
        return total

    def targets(self, batch: dict[str, Tensor]) -> int:
        """Return the number of target tokens."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def extent(self, batch: dict[str, Tensor]) -> tuple[int, int]:
        """Return the tokens of a batch, padding included, and the width of its rows."""
        return batch["input_ids"].numel(), batch["input_ids"].shape[1]

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.logits(hidden), targets, reduction="sum")

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits (N, V) of hidden states (N, H)."""
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        return head(hidden).float()

    def target_states(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the states that predict a target, (N, H), those targets (N) and the row of each (N)."""
        decoder: Any = self.model.get_decoder()  # type: ignore[operator]
        states = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        goals = labels[:, 1:]
        wanted = goals != IGNORED
        return states[:, :-1][wanted], goals[wanted], wanted.nonzero()[:, 0]

    @torch.no_grad()
    def _score(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> TokenScores:
        """Score every target token given the true tokens before it.

        A row is answered exactly by greedy decoding if and only if all its `correct` are true: each step of greedy
        decoding then sees the same prefix as here. The same holds for `among_labels` and decoding over label words.
        """
        hidden, targets, rows = self.target_states(input_ids, position_ids, labels)
        losses, right, right_label = [], [], []
        prefixes = [] if self.trie is None else _prefixes(targets.tolist(), rows.tolist())
        for start in range(0, len(targets), CHUNK):
            goal = targets[start : start + CHUNK]
            logits = self.logits(hidden[start : start + CHUNK])
            losses.append(nn.functional.cross_entropy(logits, goal, reduction="none"))
            right.append(logits.argmax(-1) == goal)
            right_label.append(_best_of_allowed(logits, goal, prefixes[start : start + CHUNK], self.trie))
        return TokenScores(rows, torch.cat(losses), torch.cat(right), torch.cat(right_label))


def _prefixes(targets: list[int], rows: list[int]) -> list[tuple[int, ...]]:
    prefixes: list[tuple[int, ...]] = []
    for at, row in enumerate(rows):
        same = at > 0 and rows[at - 1] == row
        prefixes.append((*prefixes[-1], targets[at - 1]) if same else ())
    return prefixes


def _best_of_allowed(logits: Tensor, goal: Tensor, prefixes: list[tuple[int, ...]], trie: LabelTrie | None) -> Tensor:
    best = torch.zeros_like(goal, dtype=torch.bool)
    if trie is None:
        return best
    for at, prefix in enumerate(prefixes):
        allowed = trie.next_tokens.get(prefix)
        if allowed:
            best[at] = allowed[int(logits[at, allowed].argmax())] == int(goal[at])
    return best
