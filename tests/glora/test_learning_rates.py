"""One factor on the learning rate for every GLoRA parameter."""

from typing import Any

import pytest
from peft import get_peft_model

from glora_llm.glora import GLoRAConfig
from glora_llm.glora.learning_rates import BLOCK_LR_FACTOR, DEFAULT_LR_FACTORS, lr_factors
from tests.glora.conftest import Llama

MIXED: dict[str, Any] = {
    "slots": {"A": "lora", "B": "lora", "C": "lora", "E": "scalar"},
    "paths": {r"layers\.1\.": {"A": "vector", "B": "scalar", "C": "vector", "E": "vector"}, "up_proj": {"B": "lora"}},
}


def factors_by_name(model: Any, given: dict[str, float], ratio: float = 1.0) -> dict[str, float]:
    """Name -> factor of everything trained; nothing may have two factors, or none."""
    pairs = list(lr_factors(model, given, ratio))
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sorted(key for key, _ in pairs) == sorted(names)
    return {names[key]: factor for key, factor in pairs}


def slot_of(name: str) -> str:
    return name.partition("slot_")[2][0]


@pytest.fixture
def model(llama: Llama) -> Any:
    return get_peft_model(llama(attention_bias=True), GLoRAConfig(rank=2, **MIXED))


def test_every_parameter_has_one_factor(model: Any) -> None:
    found = factors_by_name(model, {})
    assert {slot_of(name) for name in found} == {"A", "B", "C", "E"}
    assert all(factor == DEFAULT_LR_FACTORS[slot_of(name)] for name, factor in found.items())


def test_slot_d_has_its_factor(llama: Llama) -> None:
    config = GLoRAConfig(target_modules=["q_proj"], slots={"D": "vector"})
    found = factors_by_name(get_peft_model(llama(attention_bias=True), config), {})
    assert len(found) == 2 and set(found.values()) == {DEFAULT_LR_FACTORS["D"]}


def test_blocks_have_a_factor_of_their_own_until_a_is_given(llama: Llama) -> None:
    base = llama(hidden_size=64, intermediate_size=64)
    model = get_peft_model(base, GLoRAConfig(rank=1, slots={"A": "block", "C": "vector"}))
    for given, expected in (({}, BLOCK_LR_FACTOR), ({"A": 0.3}, 0.3)):
        found = factors_by_name(model, given)
        assert {factor for name, factor in found.items() if slot_of(name) == "A"} == {expected}
    plus = factors_by_name(model, {}, ratio=16.0)
    assert {name.rpartition(".")[2] for name, factor in plus.items() if factor == 16.0 * BLOCK_LR_FACTOR} == {
        "block_down"
    }


def test_given_factors_replace_the_defaults(model: Any) -> None:
    found = factors_by_name(model, {"C": 0.7, "A": 0.0})
    expected = DEFAULT_LR_FACTORS | {"C": 0.7, "A": 0.0}
    assert all(factor == expected[slot_of(name)] for name, factor in found.items())
    assert sum(factor == 0.7 for factor in found.values()) > 0


def test_loraplus_is_for_the_zero_initialised_factor_only(model: Any) -> None:
    plain, plus = factors_by_name(model, {}), factors_by_name(model, {}, ratio=16.0)
    zero_start = {name for name in plain if name.endswith(".down")}
    assert {slot_of(name) for name in zero_start} == {"A", "B", "C"}
    assert not any(p.any() for name, p in model.named_parameters() if name in zero_start)
    assert {name for name in plain if plus[name] != plain[name]} == zero_start
    assert all(plus[name] == 16.0 * plain[name] for name in zero_start)


def test_all_adapters_of_a_model_have_factors(model: Any) -> None:
    model.add_adapter("other", GLoRAConfig(rank=2, slots={"E": "vector"}))
    model.set_adapter("other")
    pairs = list(lr_factors(model, {}, 1.0))
    slots = [p for name, p in model.named_parameters() if "slot_" in name]
    assert sorted(key for key, _ in pairs) == sorted(map(id, slots))
