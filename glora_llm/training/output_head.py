"""From hidden states to the loss and to scores, the logits of a few tokens at a time.

Letters: N target tokens, H hidden, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.checkpoint import checkpoint

from glora_llm.training.sharding import is_divided

LOGITS_AT_ONCE = 2**26  # numbers: 512 tokens of a vocabulary of 128k, 0.27 GB in float32


class OutputHead:
    """A causal language model's own forward pass behind its decoder: the head, and what its family does to the logits.

    Some families scale the logits or bend them by tanh. To compute that here would repeat what transformers knows, so
    its own forward pass runs, on a copy of the model whose decoder hands on the states that it is given. The copy
    shares every other module and all parameters.

    Args:
        model: a transformers causal LM with a decoder and an output head, which may hold an adapter.
    """

    def __init__(self, model: Any):
        self.head: nn.Module = model.get_output_embeddings()
        self.copy = _with_replaced(model, {model.get_decoder(): _given_states, self.head: self.head.forward})
        self.vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (N, V) of hidden states (N, H), in the dtype that the model gives them.

        Call it within `run` alone: ZeRO 3 gathers the head's weight there.
        """
        # Not the copy itself is called: its hooks are the model's.
        logits: Tensor = type(self.copy).forward(self.copy, inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits

    def run(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """Call a function in place of the head's forward pass.

        ZeRO 3 gathers a module's weights around its forward pass: so the head is gathered once, and not as often as
        there are chunks of logits, of which each process has another number.
        """
        own = vars(self.head).pop("forward", None)  # of a library that has replaced it, such as accelerate
        self.head.forward = function
        try:
            return self.head(*tensors)
        finally:
            del self.head.forward
            if own is not None:
                self.head.forward = own

    def chunks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Cut tensors (N, ...) alike into parts of which the logits may exist at once."""
        rows = max(1, LOGITS_AT_ONCE // self.vocabulary)
        if any(self.head.children()) and any(map(is_divided, self.head.parameters())):
            rows = max(1, len(tensors[0]))  # ZeRO 3 gathers what the head consists of at every chunk: see `run`
        yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of -log p of targets (N) given their hidden states (N, H), a float32 scalar."""
        trained = any(p.requires_grad for part in (self.head, self.copy) for p in part.parameters())
        if trained or not hidden.requires_grad:
            loss: Tensor = self.run(self._loss, hidden, targets)
        else:
            loss = _KnownGradient.apply(hidden, *self.run(self._loss_and_gradient, hidden.detach(), targets))
        return loss

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Keep the logits of one chunk at most: the backward pass computes those of the others again."""
        total = hidden.new_zeros((), dtype=torch.float32)
        chunks = list(self.chunks(hidden, targets))
        for part in chunks:
            again = len(chunks) > 1 and torch.is_grad_enabled()
            total = total + (checkpoint(self._of_chunk, *part, use_reentrant=False) if again else self._of_chunk(*part))
        return total

    def _of_chunk(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(self.logits(hidden).float(), targets, reduction="sum")

    def _loss_and_gradient(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and its gradient of the hidden states (N, H)."""
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        for states, goals, place in self.chunks(hidden, targets[:, None], gradient):
            loss, d_states = self._of_chunk_and_gradient(states, goals)
            total += loss
            place.copy_(d_states)
        return total, gradient

    @torch.no_grad()
    def _of_chunk_and_gradient(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Differentiate in the forward pass, for a head that learns nothing.

        With p the softmax of the logits z and y the one-hot target, dL/dz = p - y, and the backward pass of the head
        turns it into dL/dh: all that a frozen head has to give, so no logits are kept and none are computed again.
        """
        with torch.enable_grad():
            states = hidden.detach().requires_grad_()
            logits = self.logits(states)
        log_p = log_softmax(logits.detach().float(), dim=-1)
        loss = -log_p.gather(-1, targets).sum()
        d_logits = log_p.exp_().scatter_add_(-1, targets, log_p.new_full(targets.shape, -1.0))
        (d_states,) = torch.autograd.grad(logits, states, d_logits.to(logits.dtype))
        return loss, d_states


class _KnownGradient(torch.autograd.Function):
    """A loss (scalar) that was computed together with its gradient of the hidden states (N, H)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * d_loss.to(gradient.dtype), None, None


class _States(tuple[Tensor]):
    """The output of a decoder with nothing but its last hidden states; all else that a family asks for is None."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


def _given_states(*_: Any, inputs_embeds: Tensor, **__: Any) -> _States:
    return _States((inputs_embeds,))


def _with_replaced(model: Any, forwards: dict[nn.Module, Callable[..., Any]]) -> Any:
    """Return a copy of a model that shares all its modules but some, in whose place it calls these functions."""
    whole = _shallow_copy(model)
    for replaced, forward in forwards.items():
        *parents, last = next(name for name, module in model.named_modules() if module is replaced).split(".")
        part = whole
        for name in parents:
            part._modules[name] = _shallow_copy(part._modules[name])
            part = part._modules[name]
        part._modules[last] = nn.Module()
        part._modules[last].forward = forward
    return whole


def _shallow_copy(module: Any) -> Any:
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied
