"""What a user of PEFT catches: the same exception classes, and the words that are matched on, as with LoRA."""

from collections.abc import Callable
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from glora_llm.errors import UserError
from glora_llm.glora import GLoRAConfig
from tests.glora.conftest import Llama
from tests.glora.peft_behaviour.conftest import Two, config, said

ON_A_MODEL: dict[str, tuple[Callable[[Any], Any], str]] = {
    "unknown adapter is set": (lambda model: model.set_adapter("nobody"), "nobody"),
    "unknown adapter is deleted": (lambda model: model.delete_adapter("nobody"), "nobody does not exist"),
    "a name twice": (lambda model: model.add_adapter("first", model.peft_config["first"]), "already exists"),
    "merged adapter is deleted": (
        lambda model: (model.merge_adapter(), model.delete_adapter("first")),
        "while they are",
    ),
    "names to merge are a string": (lambda model: model.merge_adapter("first"), "should be a list of strings"),
}


@pytest.mark.parametrize("case", ON_A_MODEL)
def test_on_a_model(case: str, two: Two) -> None:
    action, part = ON_A_MODEL[case]
    lora, glora = two("lora"), two("glora")
    expected = said(lambda: action(lora))
    assert part in expected[1]
    assert said(lambda: action(glora)) == expected


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"target_modules": ["nowhere"]}, r"Target modules .*nowhere.* not found in the base model"),
        ({"target_modules": ["input_layernorm"]}, r"Target module LlamaRMSNorm.* is not supported"),
    ],
)
def test_targets(keys: dict[str, Any], match: str, llama: Llama) -> None:
    for tuner in ("lora", "glora"):
        with pytest.raises(ValueError, match=match):
            get_peft_model(llama(), config(tuner, **keys))


def test_targets_that_are_not_given_are_those_of_lora(llama: Llama) -> None:
    found = [get_peft_model(llama(), config(tuner, target_modules=None)) for tuner in ("lora", "glora")]
    assert found[1].targeted_module_names == found[0].targeted_module_names != []


def test_a_rank_below_one(llama: Llama) -> None:
    with pytest.raises(ValueError, match="should be a positive integer value but the value passed is 0"):
        get_peft_model(llama(), LoraConfig(r=0, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="should be a positive integer value but the value passed is 0"):
        GLoRAConfig(rank=0)


@pytest.mark.parametrize("keys", [{"slots": {"A": "vectr"}}, {"composition": "sum"}, {"rank": -1}])
def test_a_wrong_configuration_is_a_value_error_too(keys: dict[str, Any]) -> None:
    """`UserError` for the command line, `ValueError` for a script of PEFT."""
    with pytest.raises(ValueError) as caught:
        GLoRAConfig(**keys)
    assert isinstance(caught.value, UserError)


def test_d_without_a_bias_is_a_value_error_too(llama: Llama) -> None:
    with pytest.raises(ValueError, match="q_proj: Slot D scales the frozen bias"):
        get_peft_model(llama(), GLoRAConfig(target_modules=["q_proj"], slots={"D": "vector"}))
