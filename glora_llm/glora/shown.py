"""Inputs and output gradients of layers, as a backward pass comes by them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Show = Callable[[str, Tensor, Tensor | None, Tensor], None]  # (name, x, y or None, dy)


class _Shown(torch.autograd.Function):
    """A layer's output as it is, whose backward pass shows the layer's input and the gradient at the output.

    What is shown is saved as autograd saves tensors, so that gradient checkpointing computes it anew and keeps none.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, x: Tensor, show: Callable[..., None], outputs: bool) -> Tensor:
        ctx.show = show
        ctx.save_for_backward(x, y if outputs else None)
        return y.clone() if outputs else y.detach()  # no view of y: a model may add to it in place (Falcon's blocks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.show(*ctx.saved_tensors, *gradients)
        return gradients[0], None, None, None, None


@contextmanager
def showing(layers: Mapping[str, nn.Module], show: Show, outputs: bool = False) -> Iterator[Tensor]:
    """Show the inputs and output gradients of layers in every backward pass of forward passes in the context.

    Args:
        layers: by name, each with one input and one output.
        show: gets name, x, y and dy; y is None unless asked for.
        outputs: ask for y.

    Yields:
        a tensor that all outputs depend on, so that each has a gradient, whatever is trained.
    """
    anchor = torch.zeros((), requires_grad=True)

    def watch(name: str) -> Callable[..., Tensor]:
        def hook(layer: Any, inputs: Sequence[Tensor], y: Tensor) -> Tensor:
            found: Tensor = _Shown.apply(y, anchor, inputs[0], lambda *seen: show(name, *seen), outputs)  # type: ignore[no-untyped-call]
            return found

        return hook

    handles = [layer.register_forward_hook(watch(name), prepend=True) for name, layer in layers.items()]
    try:
        yield anchor
    finally:
        for handle in handles:
            handle.remove()
