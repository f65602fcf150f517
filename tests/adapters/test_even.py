"""Scales by a layer's own weight: one step of Adam moves the output alike, whatever W0's size, slot and division."""

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from glora_llm.adapters.even import even_scales, set_scales
from glora_llm.adapters.inject import adapted_layers
from glora_llm.glora import GLoRAConfig

WIDE, NARROW, ROWS = 96, 64, 512


class Net(nn.Module):
    """One linear with a bias."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDE, NARROW)
        with torch.no_grad():
            self.linear.weight.mul_(size)
            self.linear.bias.mul_(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(x)
        return found


def even(base: nn.Module, **arguments: Any) -> Any:
    model = get_peft_model(copy.deepcopy(base), GLoRAConfig(seed=0, **arguments))  # type: ignore[arg-type]
    set_scales(model, even_scales(adapted_layers(model)))
    return model


def moved(model: Any, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Return by how much the output changes in one step of Adam at rate 1e-3, where dy comes back."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = model(x)
    (before * dy).sum().backward()
    optimizer.step()
    change: torch.Tensor = (model(x) - before).detach()
    return change


SLOTS = {
    "A lora": {"slots": {"A": "lora"}},
    "A hadamard": {"slots": {"A": "lora"}, "composition": "hadamard"},
    "A vector": {"slots": {"A": "vector"}},
    "C vector": {"slots": {"C": "vector"}},
    "D vector": {"slots": {"D": "vector"}},
}


@pytest.mark.parametrize("arguments", SLOTS.values(), ids=SLOTS)
def test_a_weight_ten_times_as_large_moves_the_output_alike(arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    small = Net(1.0)
    large = copy.deepcopy(small)
    with torch.no_grad():
        large.linear.weight.mul_(10)
        large.linear.bias.mul_(10)
    x, dy = torch.randn(ROWS, WIDE), torch.randn(ROWS, NARROW)
    expected = moved(even(small, **arguments), x, dy)
    assert expected.abs().max() > 0
    torch.testing.assert_close(moved(even(large, **arguments), x, dy), expected, rtol=2e-3, atol=1e-5)


def test_factors_are_saved_and_loaded_and_merge_exactly(tmp_path: Any) -> None:
    from peft import PeftModel

    torch.manual_seed(0)
    base = Net(7.0)
    model = even(base, slots={"A": "lora", "B": "lora", "C": "lora", "D": "scalar", "E": "vector"}, rank=4)
    x, dy = torch.randn(ROWS, WIDE), torch.randn(ROWS, NARROW)
    moved(model, x, dy)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert adapted_layers(loaded)["linear"].scales == adapted_layers(model)["linear"].scales
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(loaded.merge_and_unload()(x), model(x))
