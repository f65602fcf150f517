"""Weights of an even adapter under factors of another structure: the same function, in float64."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from glora_llm.adapters.even import Scales, even_scales, set_scales
from glora_llm.adapters.even_start import start_gains
from glora_llm.glora import GLoRAConfig

IDS = torch.arange(10)[None]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.linear, self.out = nn.Embedding(10, 64), nn.Linear(64, 48), nn.Linear(48, 5)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.out(self.linear(self.rows(ids)))
        return found


def adapted(**arguments: Any) -> Any:
    model = get_peft_model(Net(), GLoRAConfig(seed=0, scaling="even", **arguments)).double()  # type: ignore[arg-type]
    set_scales(model, even_scales(model))
    return model


def others(scales: Scales) -> Scales:
    """Return other factors, as of layers with more slots on another weight."""
    return {
        layer: {
            slot: {mode: value * (0.3 + n) for mode, value in modes.items()}
            for n, (slot, modes) in enumerate(slots.items())
        }
        for layer, slots in scales.items()
    }


@pytest.mark.parametrize("has_factors", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        {"slots": {"A": "lora", "B": "lora", "C": "lora", "D": "vector", "E": "vector"}, "rank": 4},
        {"slots": {"A": "lora", "B": "lora"}, "composition": "hadamard", "rank": 4},
        {"slots": {"A": "block", "B": "vector", "C": "vector", "D": "scalar", "E": "scalar"}, "rank": 1},
        {"slots": {"A": "vector", "B": "scalar"}},
        {"slots": {"A": "lora", "B": "lora", "E": "vector"}, "target_modules": ["rows"], "rank": 2},
    ],
    ids=["products", "hadamard", "block", "gains", "embedding"],
)
def test_the_function_stays(arguments: dict[str, Any], has_factors: bool) -> None:
    """Also of an adapter that has no factors, whose slots were multiplied by 1."""
    arguments = {"target_modules": ["linear"], **arguments}
    one, other = adapted(**arguments), adapted(**arguments)
    saved = others(even_scales(one)) if has_factors else None
    set_scales(one, saved or {})
    trained = {name: p for name, p in one.named_parameters() if p.requires_grad}
    names = {name: name.replace(".default", "") for name in trained}
    gains, generator = start_gains(other, saved, list(names.values())), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            other.get_parameter(name).copy_(gains.get(names[name], 1.0) * parameter)
        expected = one(IDS)
        torch.testing.assert_close(other(IDS), expected, rtol=1e-12, atol=1e-13)
        assert not torch.allclose(expected, Net().double()(IDS), atol=1e-2)
    assert any(gain != 1 for gain in gains.values())
