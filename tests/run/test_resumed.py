"""What a launch says that divides its work otherwise than the one before."""

from typing import Any

from glora_llm.recipe import load
from glora_llm.run.resumed import describe_changes, layout

SAME = {"processes": 2, "ZeRO stage": 1, "micro batch": 4}


def said(before: dict[str, Any], *overrides: str) -> list[str]:
    recipe = load("tiny_cpu", list(overrides))
    return describe_changes(before, layout(recipe, 1, 2), recipe)


def test_nothing_is_said_where_nothing_changed() -> None:
    assert said(SAME) == said({}) == []  # {}: the checkpoint of an older version


def test_all_that_changed_is_named() -> None:
    (line,) = said({"processes": 8, "ZeRO stage": 3, "micro batch": 4})
    assert line.startswith("going on with processes 8 -> 2, ZeRO stage 3 -> 1: the samples of each step, weights")


def test_what_is_drawn_by_micro_batch_is_not_kept_where_those_change() -> None:
    other = SAME | {"micro batch": 2}
    assert len(said(other)) == 1
    assert said(other, "adapter.dropout=0.1")[1].startswith("not kept: dropout, drawn anew for each micro batch")
    lora = ["adapter.method=lora", "adapter.slots=null", "adapter.peft={lora_dropout: 0.1}"]
    assert said(other, *lora)[1].startswith("not kept: dropout")
    net = ["adapter.slots=null", "adapter.paths=sample", "adapter.dropout=0.1"]
    assert said(other, *net)[1].startswith("not kept: the paths of the supernet and dropout, drawn anew")
    assert len(said(SAME | {"processes": 4}, *net)) == 1


def test_eight_bit_moments_are_quantised_anew() -> None:
    assert said(SAME | {"processes": 4}, "training.optimizer=adamw_8bit")[1].startswith("not kept: 8-bit moments")
