"""What a backward pass shows of layers: inputs, outputs and output gradients, whatever the model does with these."""

import pytest
import torch
from torch import Tensor, nn

from glora_llm.glora.shown import showing


@pytest.mark.parametrize("outputs", [False, True])
def test_a_model_may_add_to_an_output_in_place(outputs: bool) -> None:
    """As Falcon's blocks do: what is shown is what autograd has of the same sums in new tensors."""
    torch.manual_seed(0)
    first, second, x = nn.Linear(3, 4).double(), nn.Linear(4, 4).double(), torch.randn(2, 3, dtype=torch.float64)
    seen: dict[str, tuple[Tensor, Tensor | None, Tensor]] = {}
    layers = {"first": first, "second": second}
    with showing(layers, lambda name, *shown: seen.update({name: shown}), outputs) as anchor:
        y = first(x)
        z = second(y)
        z += y
        torch.autograd.grad(z.square().sum(), anchor, allow_unused=True)
    y = first(x)
    z = second(y)
    dy, dz = torch.autograd.grad((z + y).square().sum(), (y, z))
    for name, expected in (("first", (x, y, dy)), ("second", (y, z, dz))):
        for got, wanted in zip(seen[name], expected, strict=True):
            if got is not None:
                torch.testing.assert_close(got, wanted)
        assert (seen[name][1] is not None) == outputs
