"""Thin sketches of gradients against the whole gradient in float64."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from glora_llm.adapters.inject import adapted_layers
from glora_llm.glora import GLoRAConfig
from glora_llm.glora.sketch import Probe, leading, sketch_of
from glora_llm.vlora.partitioned import whole

WIDE, NARROW, TOKENS, RANK = 40, 56, 200, 3


class Two(nn.Module):
    """Two linears, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDE, NARROW), nn.Linear(NARROW, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(torch.tanh(self.first(x)))
        return found


@pytest.fixture
def probed() -> tuple[Probe, Any, dict[str, Tensor]]:
    """A probe that saw two batches, the model, and the whole gradients of weights and biases."""
    torch.manual_seed(0)
    base = Two()
    batches = [(torch.randn(TOKENS, 4) @ torch.randn(4, WIDE), torch.randn(TOKENS, 8)) for _ in range(2)]
    expected = {}
    for x, target in batches:
        (base(x) - target).square().sum().backward()
    for name, parameter in base.named_parameters():
        expected[name], parameter.grad = parameter.grad.clone().double(), None  # type: ignore[union-attr]
    model: Any = get_peft_model(base, GLoRAConfig(slots={"E": "vector"}, target_modules=["first", "second"]))  # type: ignore[arg-type]
    probe = Probe(adapted_layers(model), RANK, 0, lambda layer: whole(layer.parameters()))
    for part, (x, target) in enumerate(batches):
        probe.see(lambda x=x, target=target: (model(x) - target).square().sum(), part)  # type: ignore[misc]
    assert all(parameter.grad is None for parameter in model.parameters())
    return probe, model, expected


def test_singular_vectors_are_those_of_the_whole_gradient(probed: Any) -> None:
    """The first layer's gradient has rank 4 (its inputs have), so a sketch of 9 columns holds it to rounding."""
    probe, _, expected = probed
    sketch = probe.sums["first"][0].plus(probe.sums["first"][1])
    left, values, right = torch.linalg.svd(expected["first.weight"], full_matrices=False)
    found = probe.directions("first", sketch)
    torch.testing.assert_close(found.values[:4], values[:4], rtol=1e-4, atol=0)
    for k in range(RANK):
        assert abs(float(found.left[:, k] @ left[:, k])) > 1 - 1e-4
        assert abs(float(found.right[k] @ right[k])) > 1 - 1e-4


def test_those_through_the_weight_are_of_slot_a(probed: Any) -> None:
    probe, model, expected = probed
    w0 = model.base_model.model.first.base_layer.weight.detach()
    sketch = probe.sums["first"][0].plus(probe.sums["first"][1])
    _, values, right = torch.linalg.svd(w0.double().t() @ expected["first.weight"], full_matrices=False)
    found = probe.directions_through("first", sketch, w0)
    torch.testing.assert_close(found.values[:RANK], values[:RANK], rtol=1e-4, atol=0)
    assert all(abs(float(found.right[k] @ right[k])) > 1 - 1e-4 for k in range(RANK))


def test_sums_are_the_gradients_of_vectors(probed: Any) -> None:
    probe, model, expected = probed
    for name in ("first", "second"):
        sketch = probe.sums[name][0].plus(probe.sums[name][1])
        w0 = model.get_submodule(f"base_model.model.{name}").base_layer.weight.detach().double()
        gradient = expected[f"{name}.weight"]
        torch.testing.assert_close(sketch.gains.double(), (gradient * w0).sum(1), rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(sketch.shifts.double(), gradient.sum(1), rtol=1e-3, atol=1e-2)
    sketch = probe.sums["first"][0].plus(probe.sums["first"][1])
    torch.testing.assert_close(sketch.total.double(), expected["first.bias"], rtol=1e-4, atol=1e-3)
    assert float(sketch.tokens) == 2 * TOKENS


def test_the_energy_behind_the_sketch_is_the_error() -> None:
    """A full-rank matrix whose singular values fall: the leading ones come within what is cut off."""
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(60, 50)).Q, torch.linalg.qr(torch.randn(50, 50)).Q
    values = 2.0 ** -torch.arange(50)
    matrix = (left * values) @ right
    w, v = torch.randn(50, 12), torch.randn(60, 25)
    found = leading(matrix @ w, v.t() @ matrix, v)
    assert float((found.values[:4] - values[:4]).abs().max()) < 20 * float(values[12:].norm())
    exact = float((matrix.double() - (found.left * found.values) @ found.right).norm())
    assert exact < 50 * float(values[12:].norm())


def test_a_layer_without_gradient_has_no_direction() -> None:
    tests = Probe({}, RANK, 0, lambda layer: whole(()))
    assert tests.sums == {}
    found = leading(torch.zeros(10, 4), torch.zeros(9, 8), torch.randn(10, 9))
    assert found.values.abs().max() == 0 and found.left.isfinite().all()


def test_squares_are_of_each_token() -> None:
    from glora_llm.glora.sketch import Tests

    torch.manual_seed(0)
    x, dy, w0 = torch.randn(7, 3), torch.randn(7, 5), torch.randn(5, 3)
    tests = Tests(torch.randn(3, 2), torch.randn(5, 2), torch.randn(3, 2), w0 @ torch.randn(3, 2))
    found = sketch_of(tests, x, x @ w0.t(), dy)
    by_hand = sum((dy[t] * (w0 @ x[t])).square() for t in range(7))
    torch.testing.assert_close(found.squares[1], by_hand)
    torch.testing.assert_close(found.inputs, x.square().sum(0))
