"""The summed cross entropy of the target tokens. Only their logits are ever computed.

Letters: B rows, T tokens a row, N target tokens of the batch, S segments, C choices, H hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from glora_llm.training.batch import Batch
from glora_llm.training.output_head import OutputHead

# (offsets (S + 1), lengths) of a batch's segments -> what the decoder is given beside tokens and positions
PackedArguments = Callable[[Tensor, tuple[int, ...]], dict[str, Any]]


class Objective(Protocol):
    """The interface of a model wrapped for training, beside its forward pass.

    Calling it with a batch gives the summed loss of the batch's targets, a float32 scalar; with `score=True` it gives
    `TokenScores`.
    """

    def targets(self, batch: Batch) -> int:
        """Return what the loss of a batch is summed over; the mean of a step divides by the sum over its batches."""

    def extent(self, batch: Batch) -> tuple[int, int]:
        """Return the tokens (or patches) that a batch computes, and how many of them attend to each other."""


class TokenScores(NamedTuple):
    """Scores of the targets of one batch (tokens, or images), in row order, (N) each."""

    row: Tensor  # int64, row of the batch
    loss: Tensor  # float32, -log p(target)
    correct: Tensor  # bool, the target is the most likely token
    among_labels: Tensor  # bool, the target is the most likely of the tokens that continue a label word
    # The class or number of the model's choice, and the right one; of label words which of `LabelTrie.choices` it is,
    # and nan where there is one choice alone.
    predicted: Tensor | None = None
    reference: Tensor | None = None


class CausalLMObjective(nn.Module):
    """Wraps a causal language model for the engine: batch -> summed loss over its target tokens.

    A batch is what `data.batch.collate` made. The forward pass reads no value back from the device.

    Args:
        model: a transformers causal LM (adapters injected) with a decoder and an output head.
        packed: gives the attention of the model the segments of a batch; None: transformers finds them itself, where
            `position_ids` start again at 0.
    """

    def __init__(self, model: nn.Module, packed: PackedArguments | None = None):
        super().__init__()
        self.model, self.packed = model, packed
        self.head = OutputHead(model)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        target_index: Tensor,
        targets: Tensor,
        segment_offsets: Tensor,
        segment_lengths: tuple[int, ...],
        label_choices: Tensor | None = None,
        score: bool = False,
    ) -> Tensor | TokenScores:
        """Return the sum of -log p over the target tokens, a float32 scalar; or, to `score`, the scores of each.

        Args:
            input_ids: (B, T).
            position_ids: (B, T), starting at 0 with every sample.
            target_index: (N), which of the B * T states predicts each target.
            targets: (N).
            segment_offsets: (S + 1), where the segments that attention stays in begin and end.
            segment_lengths: their lengths.
            label_choices: (N, C), the tokens of label words that each target is among, for its scores.
        """
        hidden = self.decode(input_ids, position_ids, segment_offsets, segment_lengths).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, target_index)
        if score:
            return self._score(hidden, targets, target_index // input_ids.shape[1], label_choices)
        return self.head.loss(hidden, targets)

    def decode(
        self, input_ids: Tensor, position_ids: Tensor, offsets: Tensor, lengths: tuple[int, ...], **more: Any
    ) -> Any:
        """Return the decoder's output for the tokens of a batch; `more` goes to its forward pass."""
        segments = self.packed(offsets, lengths) if self.packed else {}
        decoder: Any = self.model.get_decoder()  # type: ignore[operator]
        return decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False, **segments, **more)

    def targets(self, batch: Batch) -> int:
        """Return the number of target tokens."""
        return len(batch["targets"])

    def extent(self, batch: Batch) -> tuple[int, int]:
        """Return the tokens of a batch, padding included, and the width of its rows."""
        return batch["input_ids"].numel(), batch["input_ids"].shape[1]

    @torch.no_grad()
    def _score(self, hidden: Tensor, targets: Tensor, rows: Tensor, choices: Tensor | None) -> TokenScores:
        """Score every target token given the true tokens before it.

        A row is answered exactly by greedy decoding if and only if all its `correct` are true: each step of greedy
        decoding then sees the same prefix as here. The same holds for `among_labels` and decoding over label words.
        """
        tensors = (hidden, targets) if choices is None else (hidden, targets, choices)
        return TokenScores(rows, *self.head.run(self._score_chunks, *tensors))

    def _score_chunks(self, *tensors: Tensor) -> list[Tensor]:
        scores = [_scores(self.head.logits(hidden).float(), *rest) for hidden, *rest in self.head.chunks(*tensors)]
        return [torch.cat(column) for column in zip(*scores, strict=True)]


def _scores(logits: Tensor, targets: Tensor, choices: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return what `TokenScores` holds beside the rows, (N) each, for logits (N, V), targets (N) and choices (N, C)."""
    loss = cross_entropy(logits, targets, reduction="none")
    correct = logits.argmax(-1) == targets
    if choices is None:
        return loss, correct, torch.zeros_like(correct)
    best = logits.gather(-1, choices.clamp(min=0)).argmax(-1, keepdim=True)
    among = choices.gather(-1, best)[:, 0] == targets  # a choice of no token, -1, is never a target
    decides = (choices != choices[:, :1]).any(-1)
    right = (choices == targets[:, None]).int().argmax(-1)
    chosen = [torch.where(decides, number.double(), torch.nan) for number in (best[:, 0], right)]
    return loss, correct, among, *chosen
