"""A and B of a convolution against LyCORIS 4.1.3, whose GLoRA has these two slots: equal outputs and gradients.

LyCORIS's A acts on the channels, (I_c, r)(r, I_c), alike at each of the k places of the kernel. That is our A of rank
k r: each factor is its Kronecker product with the identity of the places.
"""

from typing import Any

import pytest
import torch
from torch import nn

from glora_llm.glora import GLoRAConfig, GLoRALinear
from glora_llm.glora.conv import GLoRAConv
from glora_llm.glora.path import LayerPath, SlotSpec

R, ALPHA = 2, 3.0


@pytest.mark.parametrize(
    ("base", "shape"),
    [
        (nn.Conv2d(3, 5, 3, stride=2, padding=1), (2, 3, 6, 6)),
        (nn.Conv2d(4, 5, 1, bias=False), (2, 4, 3, 3)),
        (nn.Conv1d(3, 4, 3, padding=1), (2, 3, 7)),
        (nn.Linear(4, 5), (2, 3, 4)),
    ],
    ids=["3 x 3", "1 x 1", "one dimension", "linear"],
)
def test_equal_outputs_and_gradients(base: Any, shape: tuple[int, ...]) -> None:
    lycoris = pytest.importorskip("lycoris.modules.glora")
    torch.manual_seed(0)
    base = base.double().requires_grad_(False)
    theirs = lycoris.GLoRAModule("layer", base, lora_dim=R, alpha=ALPHA).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    places = base.weight[0, 0].numel() if base.weight.dim() > 2 else 1
    scale = ALPHA / R
    path = LayerPath((("A", SlotSpec("lora", R * places, scale)), ("B", SlotSpec("lora", R, scale))))
    ours: Any = (GLoRALinear if isinstance(base, nn.Linear) else GLoRAConv)(base)
    ours.update_layer("default", GLoRAConfig(), path)
    ours.set_adapter("default")
    identity = torch.eye(places, dtype=torch.float64)
    with torch.no_grad():
        a, b = ours.slot_A["default"], ours.slot_B["default"]
        a.down.copy_(torch.kron(theirs.a1.weight.flatten(1), identity))
        a.up.copy_(torch.kron(theirs.a2.weight.flatten(1), identity))
        b.down.copy_(theirs.b1.weight.flatten(1))
        b.up.copy_(theirs.b2.weight.flatten(1))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found, wanted = ours(x), theirs(x)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert (wanted - base(x)).abs().max() > 0.1
    dy = torch.randn_like(wanted)
    pairs = [(b.down, theirs.b1.weight), (b.up, theirs.b2.weight)]
    ours_too = torch.autograd.grad(found, [x, b.down, b.up], dy)
    theirs_too = torch.autograd.grad(wanted, [x, *(other for _, other in pairs)], dy)
    for one, other in zip(ours_too, theirs_too, strict=True):
        torch.testing.assert_close(one.flatten(), other.flatten(), rtol=1e-10, atol=1e-10)
