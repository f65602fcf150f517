"""Genomes as text: written, edited by hand, and read."""

import json
import re
from typing import Any

import pytest

from glora_llm.errors import UserError
from glora_llm.glora.path import (
    Genome,
    LayerPath,
    SlotSpec,
    genome_from_json,
    genome_from_slots,
    genome_to_json,
    genome_to_slots,
    make_path,
)
from glora_llm.glora.path_sampler import draw_path
from glora_llm.glora.supernet import slot_choices

NAME = "model.layers.0.mlp.up_proj"


def drawn(count: int) -> Genome:
    choices = slot_choices(None, [8, 3], 1.0)  # a scale of 0.125
    return {f"model.layers.{number}.q_proj": draw_path(choices, True, number) for number in range(count)}


def test_a_drawn_genome_survives_json_and_plain_values() -> None:
    genome = drawn(200)
    assert genome_from_json(genome_to_json(genome)) == genome == genome_from_slots(genome_to_slots(genome))
    odd = {
        NAME: LayerPath((("B", SlotSpec("lora", 7, 1 / 3)), ("C", SlotSpec("lora", 1, 1e-12)))),
        "empty": LayerPath(()),
    }
    assert genome_from_json(genome_to_json(odd)) == odd


def test_a_genome_as_it_is_written() -> None:
    path = make_path({"A": {"mode": "lora", "rank": 4, "alpha": 8.0}, "D": "none", "E": "vector"}, 8, 16.0)
    expected = f'{{\n  "{NAME}": {{"A": {{"mode": "lora", "rank": 4, "scale": 2.0}}, "E": "vector"}}\n}}\n'
    assert genome_to_json({NAME: path}) == expected


def test_a_genome_by_hand_may_say_none_and_order_slots_freely() -> None:
    by_hand = {
        NAME: {"E": "vector", "D": "none", "B": {"scale": 2, "rank": 4, "mode": "lora"}, "A": {"mode": "scalar"}}
    }
    path = genome_from_json(json.dumps(by_hand))[NAME]
    assert path == LayerPath((("A", SlotSpec("scalar")), ("B", SlotSpec("lora", 4, 2.0)), ("E", SlotSpec("vector"))))


@pytest.mark.parametrize("text", ["", "{", '{"a": {"B": "vector"},}', "genome", "{'a': 1}"])
def test_what_is_no_json_says_where(text: str) -> None:
    with pytest.raises(UserError, match=r"genome is not valid JSON: .* line 1 column \d+"):
        genome_from_json(text)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"B"', '{"a": "vector"}', '{"a": {}, "b": ["B", "vector"]}'])
def test_what_is_no_object_of_layers_shows_one(text: str) -> None:
    with pytest.raises(UserError, match=re.escape('expected an object such as {"model.layers.0.mlp.up_proj": {"B"')):
        genome_from_json(text)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"B": "lora"}, 'slot B of NAME: mode lora is {"mode": "lora", "rank": 8, "scale": 2.0}.'),
        ({"B": {"mode": "lora", "rank": 8}}, "slot B of NAME: mode lora is {"),
        ({"C": {"mode": "lora", "scale": 2.0}}, "slot C of NAME: mode lora is {"),
        ({"B": {"mode": "lora", "rank": 0, "scale": 2.0}}, "slot B of NAME: mode lora is {"),
        ({"B": {"mode": "lora", "rank": 2.5, "scale": 2.0}}, "slot B of NAME: mode lora is {"),
        ({"B": {"mode": "lora", "rank": True, "scale": 2.0}}, "slot B of NAME: mode lora is {"),
        ({"B": {"mode": "lora", "rank": 8, "scale": "2.0"}}, "slot B of NAME: mode lora is {"),
        ({"B": {"rank": 8, "scale": 2.0}}, "slot B of NAME has no mode: {'rank': 8, 'scale': 2.0}."),
        ({"B": {}}, "slot B of NAME has no mode: {}."),
        ({"B": None}, "slot B of NAME has no mode: None."),
        ({"B": 8}, "slot B of NAME has no mode: 8."),
        ({"B": ["lora", 8]}, "slot B of NAME has no mode: ['lora', 8]."),
        ({"B": {"mode": 8}}, "slot B of NAME has no mode: {'mode': 8}."),
        ({"A": "vektor"}, "NAME: Slot A has no mode 'vektor'; it has: lora, block, vector, scalar, none. Did you m"),
        ({"C": {"mode": "scalar"}}, "NAME: Slot C has no mode 'scalar'; it has: lora, vector, none."),
        ({"F": "vector"}, "NAME: Unknown GLoRA slot 'F'; there are A, B, C, D and E."),
    ],
)  # fmt: skip
def test_a_slot_that_is_written_wrongly_is_named(slots: dict[str, Any], message: str) -> None:
    text = json.dumps({"model.layers.1.mlp.up_proj": {"E": "vector"}, NAME: slots})
    with pytest.raises(UserError, match=re.escape("genome: " + message.replace("NAME", NAME))):
        genome_from_json(text)


def test_a_rank_and_a_scale_are_of_mode_lora_alone() -> None:
    left_over = {NAME: {"B": {"mode": "vector", "rank": 8, "scale": 2.0}}}
    assert genome_from_slots(left_over) == {NAME: make_path({"B": "vector"}, 1, 1.0)}
