"""Calibration of linears on rows of tokens: products of their inputs, squares of gradients at their outputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glora_llm.errors import UserError
from glora_llm.models.families import layers
from glora_llm.vlora import Calibration

LEAST = 1e-4  # of a mean square, as a share of the mean over all inputs or outputs: nothing is divided by less
NOTHING = 1e-30  # in place of a mean square of 0

Key = tuple[int, str]  # layer, name of a linear inside it


def calibrate(model: Any, linears: Sequence[str], rows: Sequence[Sequence[int]]) -> Calibration:
    """Measure each linear's inputs, and the gradient of the loss with respect to its outputs, over the tokens of rows.

    The loss is a row's cross entropy of next tokens, summed over them, in float32: its gradient at the output of one
    token holds what that output changes in the predictions of all later ones. One forward and one backward pass a
    row, through the activations alone: no weight gets a gradient.

    Args:
        model: a causal language model in eval mode.
        linears: names inside a layer.
        rows: token ids; a row of one token has inputs but no loss. No rows: nothing is measured.

    Raises:
        UserError: where inputs or gradients are not finite.
    """
    sums = Sums()
    start: list[Tensor] = []
    handles = [
        layer.get_submodule(name).register_forward_hook(sums.watch((number, name)))
        for number, layer in enumerate(layers(model))
        for name in linears
    ]
    handles.append(model.get_input_embeddings().register_forward_hook(lambda _, __, out: _begin(out, start)))
    try:
        for row in rows:
            ids = torch.tensor([list(row)], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            loss = nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            torch.autograd.grad(loss, start.pop())
    finally:
        for handle in handles:
            handle.remove()
    return sums.roots(sum(len(row) for row in rows), model.device)


class Sums:
    """Sums over tokens of products of inputs and of squares of gradients, on the CPU: together as large as the model.

    Attributes:
        inputs: x x' of every linear, (I, I); linears of the same inputs share a tensor.
        gradients: squares of the gradient at the outputs, (O).
    """

    inputs: dict[Key, Tensor]
    gradients: dict[Key, Tensor]

    def __init__(self) -> None:
        self.inputs, self.gradients = {}, {}
        self._last: tuple[Tensor, Key] | None = None  # what a linear got last, so that q, k and v multiply it once

    def watch(self, key: Key) -> Any:
        """Return a forward hook of the linear."""

        def add(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if self._last is not None and self._last[0] is arguments[0]:
                self.inputs[key] = self.inputs[self._last[1]]
            else:
                x = arguments[0].detach().float().flatten(0, -2)
                product = (x.T @ x).cpu()
                self.inputs[key] = self.inputs[key].add_(product) if key in self.inputs else product
                self._last = arguments[0], key
            if output.requires_grad:
                output.register_hook(lambda gradient: self._add_gradient(key, gradient))

        return add

    def _add_gradient(self, key: Key, gradient: Tensor) -> None:
        squares = gradient.float().square().flatten(0, -2).sum(0).cpu()
        self.gradients[key] = self.gradients[key] + squares if key in self.gradients else squares

    def roots(self, tokens: int, device: torch.device) -> Calibration:
        """Return the roots of the means, in place of the sums.

        Of I inputs, I / (I + tokens) of the products of different ones is left out: few tokens say little about
        them, and what is left is positive definite.

        Raises:
            UserError: where they are not finite.
        """
        self._last = None
        for key, total in [*self.inputs.items(), *self.gradients.items()]:
            if not total.isfinite().all():
                raise UserError(
                    f"Inputs of {key[1]} in layer {key[0]}, or gradients at its outputs, are not finite over the "
                    "training rows. Look for NaN and infinite values in the model's weights; "
                    "model.from_dense.calibration_rows=0 goes by the weights alone."
                )
        for total in {id(total): total for total in self.inputs.values()}.values():
            squares = _not_zero(total.diagonal() / tokens)
            total.mul_(1 / (tokens + len(total)))
            total.diagonal().copy_(squares)
            total.copy_(torch.linalg.cholesky(total.to(device)))
        if not any(total.any() for total in self.gradients.values()):
            return Calibration(self.inputs, {})
        return Calibration(
            self.inputs, {key: _not_zero(total / tokens).sqrt() for key, total in self.gradients.items()}
        )


def _not_zero(squares: Tensor) -> Tensor:
    """Raise mean squares that are far below the others."""
    return squares.clamp(min=max(LEAST * float(squares.mean()), NOTHING))


def _begin(embedded: Tensor, start: list[Tensor]) -> Tensor:
    """Let gradients reach the embedded tokens, and no further."""
    start[:] = [embedded.detach().requires_grad_()]
    return start[0]
