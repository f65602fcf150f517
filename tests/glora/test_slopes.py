"""Slopes of a supernet are the directional derivatives of its dense twin, for every choice of every slot."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glora_llm.glora import GLoRALinear
from glora_llm.glora.linear import Slots, effective
from glora_llm.glora.modes import slot_values
from glora_llm.glora.path import LayerPath, slots_with
from glora_llm.glora.path_sampler import draw_path
from glora_llm.glora.slopes import slopes
from glora_llm.models.resolve import ResolvedModel
from tests.glora.conftest import IDS, Fill, glora, glora_layers
from tests.glora.test_quantised import quantised_and_twin
from tests.glora.test_supernet import supernet_layer

NONE = LayerPath(())


def net(composition: str, has_bias: bool, fill: Fill) -> dict[str, GLoRALinear]:
    """Two supernet linears in float64."""
    torch.manual_seed(0)
    bases = nn.Linear(9, 10, bias=has_bias).double(), nn.Linear(10, 5, bias=has_bias).double()
    return {f"linear{n}": supernet_layer(base, composition, fill).double() for n, base in enumerate(bases)}


def loss_of(first: Any, second: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 9, generator=generator, dtype=torch.float64)
    found: Tensor = second(torch.tanh(first(x))).pow(3).sum()
    return found


def formula(layer: GLoRALinear, slots: Slots) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias that slots make."""
    base = layer.get_base_layer()
    weight, bias = effective(base.weight, base.bias, slots, layer.composition["default"])
    return weight, torch.zeros(layer.out_features, dtype=weight.dtype) if bias is None else bias


@torch.no_grad()
def changes(layer: GLoRALinear) -> list[tuple[Tensor, Tensor]]:
    """Return what each choice adds to weight and bias, by the formula as written."""
    weight, bias = formula(layer, Slots())
    found = []
    for slot in slots_with(layer.b0 is not None):
        owner = getattr(layer, f"slot_{slot}")["default"]
        for spec in layer.choices["default"][slot]:
            own = {} if spec.mode == "none" else slot_values(slot, spec, owner, Tensor.detach)
            changed, shifted = formula(layer, Slots(**own))
            found.append((changed - weight, shifted - bias))
    return found


@pytest.mark.parametrize("drawn", [False, True], ids=["mode none in every slot", "a drawn path"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("composition", ["product", "hadamard"])
def test_slopes_are_the_derivatives_of_the_dense_twin(
    composition: str, has_bias: bool, drawn: bool, fill: Fill
) -> None:
    layers = net(composition, has_bias, fill)
    twins, expected = [], []
    for number, layer in enumerate(layers.values()):
        layer.path["default"] = draw_path(layer.choices["default"], has_bias, number) if drawn else NONE
        twin = nn.Linear(layer.in_features, layer.out_features).double()
        weight, bias = formula(layer, layer.slots("default"))
        twin.weight.data, twin.bias.data = weight.detach(), bias.detach()
        twins.append(twin)
    loss_of(*twins).backward()
    for twin, layer in zip(twins, layers.values(), strict=True):
        assert twin.weight.grad is not None and twin.bias.grad is not None
        expected += [-float((twin.weight.grad * w).sum() + (twin.bias.grad * b).sum()) for w, b in changes(layer)]
    found = slopes(layers, lambda: loss_of(*layers.values()))
    assert found.dtype == torch.float64 and len(found) == sum(len(changes(layer)) for layer in layers.values())
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert (found != 0).sum() == len(found) - 2 * len(slots_with(has_bias)), "all but mode none"


def test_nothing_is_left_behind(fill: Fill) -> None:
    """No gradient of a parameter, no hook, and the layer computes what it did; also when the loss fails."""
    layers = net("product", True, fill)
    before = loss_of(*layers.values()).detach()
    with torch.no_grad():  # as a search runs
        slopes(layers, lambda: loss_of(*layers.values()))
    with pytest.raises(ZeroDivisionError):
        slopes(layers, lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    for layer in layers.values():
        assert all(parameter.grad is None for parameter in layer.parameters()) and not layer._forward_hooks
    assert torch.equal(loss_of(*layers.values()), before)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_slopes_on_a_quantised_base_are_those_of_its_dense_twin(
    quantization: str, tiny: ResolvedModel, fill: Fill
) -> None:
    found = []
    for base in quantised_and_twin(quantization, tiny):
        model = glora(base, supernet={"ranks": [4, 2]})
        fill(model)

        def loss(model: Any = model) -> Tensor:
            out: Tensor = model(input_ids=IDS, labels=IDS).loss
            return out

        found.append(slopes(glora_layers(model), loss))
    assert found[1].abs().max() > 0.01
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4 * float(found[1].abs().max()))
