"""First-order (Taylor) importance of each choice of each slot of a supernet, all by one backward pass.

Let x (T, I) enter a layer and g (T, O) be the gradient at its output, whatever path the layer computes. A choice that
adds dW to the weight and db to the bias then adds <g' x, dW> + <sum of g, db> to the loss. Every layer answers while
the gradient passes by, so nothing of W0's size outlives a layer.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from glora_llm.glora.frozen_weight import compute_dtype, dense_weight
from glora_llm.glora.layer import GLoRALinear
from glora_llm.glora.linear import Slots
from glora_llm.glora.modes import slot_values
from glora_llm.glora.path import slots_with
from glora_llm.glora.shown import showing
from glora_llm.schema.slots import BLOCK


def slopes(layers: Mapping[str, GLoRALinear], loss: Callable[[], Tensor]) -> Tensor:
    """Return by how much the loss would fall for each choice that were added, to first order.

    Args:
        layers: of a supernet; each computes the path that is set.
        loss: runs the model forward and returns its summed loss, with a graph. Nobody's `.grad` is touched.

    Returns:
        float64 on the CPU: the layers' choices one after the other, each slot's in their order; mode none is 0.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor, _: Tensor | None, dy: Tensor) -> None:
        found[name] = _layer_slopes(layers[name], x, dy)

    with showing(layers, keep) as anchor, torch.enable_grad():
        torch.autograd.grad(loss(), anchor, allow_unused=True)  # the anchor itself gets none
    return -torch.cat([found[name] for name in layers]).cpu()


@torch.no_grad()
def _layer_slopes(layer: GLoRALinear, x: Tensor, dy: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    gradient, total = layer.output_gradients(x, dy.to(dtype))
    w0 = dense_weight(layer.get_base_layer(), compute_dtype(layer.get_base_layer()) or x.dtype).to(dtype)
    b0 = None if layer.b0 is None else layer.b0.to(dtype)
    composition, values = layer.composition["default"], list[Tensor]()
    for slot in slots_with(b0 is not None):
        owner = getattr(layer, f"slot_{slot}")["default"]
        for spec in layer.choices["default"][slot]:
            factor = layer.factor("default", slot, spec.mode)
            own = {} if spec.mode == "none" else slot_values(slot, spec, owner, Tensor.detach, factor)
            values.append(first_order(gradient, total, w0, b0, Slots(**own).to(dtype), composition))
    return torch.stack(values).double()


def first_order(gradient: Tensor, total: Tensor, w0: Tensor, b0: Tensor | None, s: Slots, composition: str) -> Tensor:
    """Return <gradient, W - W0> + <total, b - b0>, where W and b are `linear.effective` of the same slots.

    Thin products only: no dW is formed.

    Args:
        gradient: of the loss with respect to the weight, (O, I).
        total: of the loss with respect to the bias, (O).
    """
    found = gradient.new_zeros(())
    if s.a_down is not None and s.a_up is not None:
        if composition == "product":
            found += s.a_scale * (((w0 @ s.a_down).t() @ gradient) * s.a_up).sum()
        else:
            found += s.a_scale * ((s.a_down.t() @ (gradient * w0)) * s.a_up).sum()
    if s.a_down is not None and s.a_blocks is not None:
        by_block = (gradient * w0).unflatten(1, (-1, BLOCK)).sum(2)
        found += s.a_scale * ((s.a_down.t() @ by_block) * s.a_blocks).sum()
    if s.a_gain is not None:
        found += (s.a_gain * (gradient * w0).sum(1)).sum()
    if s.b_down is not None and s.b_up is not None:
        found += s.b_scale * ((s.b_down.t() @ gradient) * s.b_up).sum()
    if s.b_shift is not None:
        found += (s.b_shift * gradient.sum(1)).sum()
    if s.c is not None:
        found += total @ (w0 @ s.c)
    if s.d is not None and b0 is not None:
        found += (s.d * b0 * total).sum()
    if s.e is not None:
        found += (s.e * total).sum()
    return found
