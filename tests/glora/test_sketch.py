"""Thin sketches of gradients against the whole gradient in float64."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from glora_llm.adapters.inject import adapted_layers
from glora_llm.glora import GLoRAConfig
from glora_llm.glora.sketch import Probe, RandomMatrices, Reads, Sketch, columns_of, leading, plus, sketch_of
from glora_llm.models.resolve import ResolvedModel
from glora_llm.vlora.partitioned import whole
from tests.glora.conftest import IDS, glora
from tests.glora.test_quantised import quantised_and_twin

WIDE, NARROW, TOKENS, RANK = 40, 56, 200, 3
ALL = Reads(through=True, gains=True, shifts=True, noise=True)


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
    probe = Probe(adapted_layers(model), RANK, 0, lambda layer: whole(layer.parameters()), 2, ALL)
    for part, (x, target) in enumerate(batches):
        probe.see(lambda x=x, target=target: (model(x) - target).square().sum(), part)  # type: ignore[misc]
    assert all(parameter.grad is None for parameter in model.parameters())
    return probe, model, expected


def both(probe: Probe, name: str) -> Sketch:
    return plus(*probe.sums[name])


def test_singular_vectors_are_those_of_the_whole_gradient(probed: Any) -> None:
    """The first layer's gradient has rank 4 (its inputs have), so a sketch of 9 columns holds it to rounding."""
    probe, _, expected = probed
    sketch = both(probe, "first")
    left, values, right = torch.linalg.svd(expected["first.weight"], full_matrices=False)
    found = probe.directions("first", sketch)
    torch.testing.assert_close(found.values[:4], values[:4], rtol=1e-4, atol=0)
    for k in range(RANK):
        assert abs(float(found.left[:, k] @ left[:, k])) > 1 - 1e-4
        assert abs(float(found.right[k] @ right[k])) > 1 - 1e-4


def test_those_through_the_weight_are_of_slot_a(probed: Any) -> None:
    probe, model, expected = probed
    w0 = model.base_model.model.first.base_layer.weight.detach()
    sketch = both(probe, "first")
    _, values, right = torch.linalg.svd(w0.double().t() @ expected["first.weight"], full_matrices=False)
    found = probe.directions_through("first", sketch, w0)
    torch.testing.assert_close(found.values[:RANK], values[:RANK], rtol=1e-4, atol=0)
    assert all(abs(float(found.right[k] @ right[k])) > 1 - 1e-4 for k in range(RANK))


def test_sums_are_the_gradients_of_vectors(probed: Any) -> None:
    probe, model, expected = probed
    for name in ("first", "second"):
        sketch = both(probe, name)
        w0 = model.get_submodule(f"base_model.model.{name}").base_layer.weight.detach().double()
        gradient = expected[f"{name}.weight"]
        torch.testing.assert_close(sketch["gains"].double(), (gradient * w0).sum(1), rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(sketch["shifts"].double(), gradient.sum(1), rtol=1e-3, atol=1e-2)
    sketch = both(probe, "first")
    torch.testing.assert_close(sketch["total"].double(), expected["first.bias"], rtol=1e-4, atol=1e-3)
    assert float(sketch["tokens"]) == 2 * TOKENS


def test_only_what_is_read_is_summed() -> None:
    model: Any = get_peft_model(Two(), GLoRAConfig(slots={"E": "vector"}, target_modules=["first"]))  # type: ignore[arg-type]
    around = lambda layer: whole(layer.parameters())  # noqa: E731
    for reads, names in ((Reads(), {"y", "z", "z_a", "total"}), (Reads(through=False), {"y", "z", "total"})):
        probe = Probe(adapted_layers(model), RANK, 0, around, 1, reads)
        probe.see(lambda: model(torch.ones(5, WIDE)).square().sum(), 0)
        (sketch,) = probe.sums["first"]
        assert set(sketch) == names and all(tensor.any() for tensor in sketch.values())


def test_layers_in_bfloat16_have_nearly_the_same_directions() -> None:
    torch.manual_seed(1)
    x, dy = torch.randn(TOKENS, 4) @ torch.randn(4, WIDE), torch.randn(TOKENS, NARROW)
    w0 = torch.randn(NARROW, WIDE)
    tests = RandomMatrices(torch.randn(WIDE, 9), torch.randn(NARROW, 19), torch.randn(WIDE, 19))
    tests = tests._replace(v=torch.cat([tests.v, w0 @ tests.v_a], dim=1))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        at = RandomMatrices(*(tensor.to(dtype) for tensor in tests))
        sketch = sketch_of(at, Reads(), x.to(dtype), columns_of(x.to(dtype), at.w, False), dy.to(dtype))
        found.append(leading(sketch["y"].t(), sketch["z"], at.v[:, :19]))
    torch.testing.assert_close(found[1].values[:4], found[0].values[:4], rtol=2e-2, atol=0)
    overlap = (found[0].left[:, :4].t() @ found[1].left[:, :4]).square().sum() / 4
    assert float(overlap) > 0.999


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


def test_sketches_on_nf4_are_those_of_its_dense_twin(tiny: ResolvedModel) -> None:
    found: list[dict[str, Sketch]] = []
    for base in quantised_and_twin("nf4", tiny):
        model = glora(base, slots={"E": "vector"})
        probe = Probe(adapted_layers(model), RANK, 0, lambda layer: whole(layer.parameters()), 1, ALL)
        probe.see(lambda model=model: model(input_ids=IDS, labels=IDS).loss, 0)  # type: ignore[misc]
        found.append({name: sums[0] for name, sums in probe.sums.items()})
    packed, dense = found
    assert packed.keys() == dense.keys() and len(packed) == 14
    for name, sketch in dense.items():
        for key, value in sketch.items():
            largest = float(value.abs().max())
            assert largest > 0, (name, key)
            torch.testing.assert_close(packed[name][key], value, rtol=1e-3, atol=1e-4 * largest, msg=f"{name} {key}")


def test_squares_are_of_each_token() -> None:
    torch.manual_seed(0)
    x, dy, w0 = torch.randn(7, 3), torch.randn(7, 5), torch.randn(5, 3)
    tests = RandomMatrices(torch.randn(3, 2), torch.randn(5, 4), torch.randn(3, 2))
    found = sketch_of(tests, ALL, x, columns_of(x, tests.w, True), dy, x @ w0.t())
    torch.testing.assert_close(found["gains2"], sum((dy[t] * (w0 @ x[t])).square() for t in range(7)))
    torch.testing.assert_close(found["shifts2"], sum((dy[t] * x[t].sum()).square() for t in range(7)))
    torch.testing.assert_close(found["total2"], dy.square().sum(0))
    torch.testing.assert_close(found["inputs2"], x.square().sum(0))
