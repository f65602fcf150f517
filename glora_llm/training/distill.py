"""Distillation: a causal language model learns the next token, and what a frozen teacher thinks of all next tokens.

With student logits z, teacher logits u, target y, weight w and temperature t, the loss of one target token is

    (1 - w) (-log softmax(z)[y]) + w t^2 KL(softmax(u / t) || softmax(z / t)) + v mean_l |h_l - g_l|^2 / |g_l|^2

(Hinton et al., arXiv 1503.02531, section 2: t^2 keeps the size of the gradients), h_l and g_l the states of student and
teacher at the token that predicts it: the embeddings, after each layer, and after the last norm.

Letters: N target tokens of the batch, H hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.checkpoint import checkpoint

from glora_llm.schema import DistillSection
from glora_llm.training.batch import Batch
from glora_llm.training.objectives import CausalLMObjective, TokenScores

TERMS = ("cross_entropy", "divergence", "states")


class DistilledObjective(nn.Module):
    """An objective whose loss looks at a teacher too; its scores are those of the student alone.

    The teacher is no submodule: no optimizer, ZeRO stage or checkpoint sees it, and every process holds it whole. Or it
    is the student itself, in another state: the largest path of a supernet (in-place distillation, arXiv 1903.05134).

    Args:
        student: of the model that is trained.
        teacher: of a frozen model with the same vocabulary, on the same device; None: the student.
        settings: weight, temperature and states.
        as_teacher: makes the student its teacher for one forward pass, and says whether it is that anyway: then the
            labels alone count. The pass is made all the same, for under ZeRO 3 all processes have to make it.

    Attributes:
        sums: of the loss's terms over the targets that this process has trained on since the last `observe`, and their
            number, (4) float64.
    """

    def __init__(
        self,
        student: CausalLMObjective,
        teacher: CausalLMObjective | None,
        settings: DistillSection,
        as_teacher: Callable[[], AbstractContextManager[bool | None]] = nullcontext,
    ):
        super().__init__()
        self.student, self.settings, self.as_teacher = student, settings, as_teacher
        # in a tuple, which registers nothing
        self._teacher = (student if teacher is None else teacher.eval().requires_grad_(False),)
        self.sums = torch.zeros(len(TERMS) + 1, dtype=torch.float64)

    @property
    def teacher(self) -> CausalLMObjective:
        """The teacher's objective: what scores it."""
        return self._teacher[0]

    @property
    def is_own_teacher(self) -> bool:
        """True if no other model is learnt from."""
        return self.teacher is self.student

    def forward(self, score: bool = False, **batch: Any) -> Tensor | TokenScores:
        """Return the summed loss of a batch's target tokens, a float32 scalar; or, to `score`, the student's scores.

        In evaluation mode the loss is that of the labels alone: a search asks for its gradient.
        """
        if score or not self.training:
            alone: Tensor | TokenScores = self.student(**batch, score=score)
            return alone
        every = self.settings.states > 0
        mine = _states(self.student, batch, every)
        with torch.no_grad(), self.as_teacher() as is_teacher:
            theirs = _states(self.teacher, batch, every)
        terms = self.student.head.run(self._terms, mine[-1], theirs[-1].to(mine[-1].device), batch["targets"])
        errors = state_errors(mine, theirs) if every else terms.new_zeros(())
        if torch.is_grad_enabled():
            self._note(torch.stack([*terms, errors]), len(batch["targets"]))
        weight = 0.0 if is_teacher else self.settings.weight
        loss: Tensor = (1 - weight) * terms[0] + weight * terms[1] + self.settings.states * errors
        return loss

    def targets(self, batch: Batch) -> int:
        """Return the number of target tokens."""
        return self.student.targets(batch)

    def extent(self, batch: Batch) -> tuple[int, int]:
        """Return the tokens of a batch, padding included, and the width of its rows."""
        return self.student.extent(batch)

    def observe(self) -> dict[str, float]:
        """Return the mean terms of the loss since the last call, nats a token; all processes call it together."""
        sums = self.sums.clone()
        self.sums.zero_()
        dist.all_reduce(sums)
        *terms, count = sums.tolist()
        names = TERMS if self.settings.states else TERMS[:2]
        return {f"train/{name}": value / max(count, 1.0) for name, value in zip(names, terms, strict=False)}

    def _note(self, terms: Tensor, count: int) -> None:
        values = terms.detach().double()
        self.sums = self.sums.to(values.device)
        self.sums += torch.cat([values, values.new_full((1,), count)])

    def _terms(self, hidden: Tensor, theirs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy and the divergence, summed over targets; logits of one chunk are kept."""
        total = torch.zeros(2, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        chunks = list(self.student.head.chunks(hidden, theirs, targets))
        for part in chunks:
            again = len(chunks) > 1 and torch.is_grad_enabled()
            total = total + (checkpoint(self._of_chunk, *part, use_reentrant=False) if again else self._of_chunk(*part))
        return total

    def _of_chunk(self, hidden: Tensor, theirs: Tensor, targets: Tensor) -> Tensor:
        logits = self.student.head.logits(hidden).float()
        with torch.no_grad(), self.as_teacher():  # the head may hold slots of the supernet too
            known = self.teacher.head.logits(theirs).float()
        divergence = logit_divergence(logits, known, self.settings.temperature)
        return torch.stack([cross_entropy(logits, targets, reduction="sum"), divergence])


def logit_divergence(logits: Tensor, known: Tensor, temperature: float) -> Tensor:
    """Return t^2 KL(softmax(u / t) || softmax(z / t)), summed over N tokens, of logits z and a teacher's u, (N, V)."""
    log_q, log_p = log_softmax(logits / temperature, -1), log_softmax(known / temperature, -1)
    return (log_p.exp() * (log_p - log_q)).sum() * temperature**2


def state_errors(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Return mean_l |h_l - g_l|^2 / |g_l|^2, summed over N tokens, of states (N, H) of student and teacher."""
    errors = [
        ((h.float() - g.to(h.device).float()).square().sum(-1) / g.to(h.device).float().square().sum(-1)).sum()
        for h, g in zip(mine, theirs, strict=True)
    ]
    return torch.stack(errors).mean()


def _states(objective: CausalLMObjective, batch: Batch, every: bool) -> list[Tensor]:
    """Return the states (N, H) that predict the targets: the last one, with `every` those of all layers before it."""
    inputs = (batch[name] for name in ("input_ids", "position_ids", "segment_offsets", "segment_lengths"))
    more: dict[str, Any] = {"output_hidden_states": True} if every else {}
    output = objective.decode(*inputs, **more)
    found = output.hidden_states if every else [output.last_hidden_state]
    return [states.flatten(0, 1).index_select(0, batch["target_index"]) for states in found]
