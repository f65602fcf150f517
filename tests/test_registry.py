"""The registry: stores, refuses a second entry, and lists what there is."""

import pytest

from glora_llm.errors import UserError
from glora_llm.registry import Registry


def colours() -> Registry[int]:
    registry: Registry[int] = Registry("colour")
    registry.register("red")(1)
    registry.register("blue")(2)
    return registry


def test_register_returns_its_argument_and_get_finds_it() -> None:
    registry: Registry[type] = Registry("class")

    @registry.register("one")
    class One:
        pass

    assert registry.get("one") is One


def test_names_are_sorted() -> None:
    assert colours().names() == ["blue", "red"]


def test_a_second_entry_of_one_name_is_refused() -> None:
    with pytest.raises(ValueError, match="colour 'red' is registered twice"):
        colours().register("red")(3)


def test_an_unknown_name_lists_what_there_is_and_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        colours().get("bleu")
    assert str(caught.value) == "Unknown colour 'bleu'; there is: blue, red. Did you mean 'blue'?"


def test_an_unknown_name_far_from_all_suggests_nothing() -> None:
    with pytest.raises(UserError) as caught:
        colours().get("xyz")
    assert "Did you mean" not in str(caught.value)
