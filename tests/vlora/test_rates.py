"""Rates of bases and increments: given, by the rule, and which matrices decay."""

import math

import pytest

from glora_llm.schema.vlora import VLoRARates
from glora_llm.vlora import VLoRAConfig, make_compounds, vlora_layers
from glora_llm.vlora.rates import Rate, rates
from tests.vlora.conftest import small_llama

KEYS: dict[str, object] = {"rank": 2, "alpha": 6.0, "gains": ["row", "diagonal"]}


@pytest.mark.parametrize("increments", ["next", "all"])
def test_the_rule_is_that_of_k_and_r(increments: str) -> None:
    model = small_llama()
    make_compounds(model, model.model.layers, VLoRAConfig(**KEYS, increments=increments))  # type: ignore[arg-type]
    found = rates(model, "auto")
    layers = vlora_layers(model)
    assert len(layers) == (28 if increments == "all" else 21)
    for layer in layers.values():
        assert found[id(layer.increment_b)] == Rate(math.sqrt(3 * layer.in_features / 2) / 3.0)
        assert found[id(layer.increment_a)] == found[id(layer.increment_row)] == Rate(1.0)
        assert found[id(layer.base_owner.weight)] == Rate(0.5), "k is 4"
    others = [name for name, value in model.named_parameters() if id(value) not in found]
    assert others and all("norm" in name or "embed" in name or "lm_head" in name for name in others)


def test_given_rates_and_a_decay_of_bases_alone() -> None:
    model = small_llama()
    make_compounds(model, model.model.layers, VLoRAConfig(**KEYS))  # type: ignore[arg-type]
    found = rates(model, VLoRARates(base=0.5, b=8.0, gain=2.0), decay_increments=False)
    layer = next(iter(vlora_layers(model).values()))
    assert found[id(layer.increment_b)] == Rate(8.0, False) and found[id(layer.increment_a)] == Rate(1.0, False)
    assert found[id(layer.increment_diagonal)] == Rate(2.0, False) and found[id(layer.base_owner.weight)] == Rate(0.5)
    assert set(rates(model, None).values()) == {Rate()}
