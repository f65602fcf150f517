"""The slot table, paths by pattern, genomes as JSON, and the presets."""

import re
from typing import Any, get_args

import pytest

from glora_llm.errors import UserError
from glora_llm.glora.path import (
    LayerPath,
    SlotSpec,
    genome_from_json,
    genome_to_json,
    make_path,
    path_for,
)
from glora_llm.schema.slots import DEFAULT_SLOTS, PRESET_COMPOSITION, PRESETS, SLOT_MODES, Preset
from tests.glora.paths import all_paths


def test_the_slot_table_is_the_paper_s() -> None:
    assert list(SLOT_MODES) == ["A", "B", "C", "D", "E"]
    assert {slot: len(modes) for slot, modes in SLOT_MODES.items()} == {"A": 5, "B": 4, "C": 3, "D": 3, "E": 3}
    assert [slot for slot, modes in SLOT_MODES.items() if "lora" in modes] == ["A", "B", "C"]
    assert [slot for slot, modes in SLOT_MODES.items() if "scalar" not in modes] == ["C"]
    assert all("none" in modes and "vector" in modes for modes in SLOT_MODES.values())


@pytest.mark.parametrize(("has_bias", "count"), [(True, 432), (False, 144)])
def test_all_paths_are_different(has_bias: bool, count: int) -> None:
    paths = all_paths(4, 0.5, has_bias)
    assert len(paths) == len(set(paths)) == count
    assert sum(path["D"].mode == "none" for path in paths) == 144
    low_rank = {spec for path in paths for _, spec in path.active() if spec.mode == "lora"}
    assert low_rank == {SlotSpec("lora", 4, 0.5)}


def test_a_path_names_what_is_active() -> None:
    path = make_path({"A": "lora", "C": "none", "E": "vector"}, rank=4, alpha=8.0)
    assert [slot for slot, _ in path.active()] == ["A", "E"]
    assert path["A"] == SlotSpec("lora", 4, 2.0) and path["B"] == path["C"] == SlotSpec("none")
    assert path.without("A") == make_path({"E": "vector"}, rank=9, alpha=1.0)


@pytest.mark.parametrize(
    ("slots", "touches"),
    [({"A": "lora", "B": "lora"}, False), ({"D": "vector"}, False), ({"C": "vector"}, True), ({"E": "scalar"}, True)],
)
def test_c_and_e_need_a_bias(slots: dict[str, str], touches: bool) -> None:
    assert make_path(slots, 2, 2.0).touches_bias() is touches


@pytest.mark.parametrize(
    ("stabilised", "scales"), [(False, {"A": 16 / 4, "B": 8 / 2}), (True, {"A": 16 / 4**0.5, "B": 8 / 2**0.5})]
)
def test_rank_and_alpha_by_slot(stabilised: bool, scales: dict[str, float]) -> None:
    slots = {"A": {"mode": "lora", "rank": 4}, "B": {"mode": "lora", "alpha": 8.0}, "D": {"mode": "scalar"}}
    path = make_path(slots, rank=2, alpha=16.0, rank_stabilized=stabilised)
    assert (path["A"].rank, path["B"].rank, path["D"]) == (4, 2, SlotSpec("scalar"))
    assert {slot: path[slot].scale for slot in "AB"} == pytest.approx(scales)


def test_scaling_one_is_expressible() -> None:
    assert make_path({"A": "lora"}, rank=8, alpha=8.0)["A"].scale == 1.0


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"A": "lroa"}, "Slot A has no mode 'lroa'; it has: lora, block, vector, scalar, none. Did you mean 'lora'?"),
        ({"C": "scaler"}, "Slot C has no mode 'scaler'; it has: lora, vector, none."),
        ({"D": "lora"}, "Slot D has no mode 'lora'; it has: vector, scalar, none."),
        ({"E": {"mode": "vectr"}}, "it has: vector, scalar, none. Did you mean 'vector'?"),
        ({"F": "lora"}, "Unknown GLoRA slot 'F'; there are A, B, C, D and E."),
    ],
)
def test_wrong_slots_are_named_with_the_nearest(slots: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make_path(slots, rank=2, alpha=2.0)


def test_the_last_pattern_that_matches_wins() -> None:
    default, first, second = (make_path({"E": mode}, 1, 1.0) for mode in ("none", "scalar", "vector"))
    patterns = {r"layers\.1\.": first, r"q_proj$": second}
    assert path_for("model.layers.0.k_proj", default, patterns) is default
    assert path_for("model.layers.1.k_proj", default, patterns) is first
    assert path_for("model.layers.1.q_proj", default, patterns) is second
    assert path_for("model.layers.1.q_proj", default, dict(reversed(patterns.items()))) is first
    assert path_for("model.layers.11.k_proj", default, patterns) is default


def test_a_genome_survives_json() -> None:
    mixed = make_path({"A": {"mode": "lora", "rank": 3, "alpha": 1.0}, "C": "lora", "E": "scalar"}, 8, 16.0, True)
    genome = {f"layer.{number}": path for number, path in enumerate([*all_paths(4, 0.25), mixed, LayerPath(())])}
    text = genome_to_json(genome)
    assert genome_from_json(text) == genome
    assert len(text.splitlines()) == len(genome) + 2  # a layer a line
    assert genome_from_json(genome_to_json({})) == {}


@pytest.mark.parametrize(("old", "new"), [('"vector"', '"vektor"'), ('"E"', '"F"')])
def test_a_genome_edited_wrongly_is_an_error(old: str, new: str) -> None:
    text = genome_to_json({"layer": make_path({"E": "vector"}, 1, 1.0)})
    assert old in text
    with pytest.raises(UserError, match=r"vektor|'F'"):
        genome_from_json(text.replace(old, new))


def test_presets_are_valid_paths() -> None:
    assert set(PRESETS) == set(get_args(Preset))
    modes = {name: {slot: spec.mode for slot, spec in make_path(p, 4, 4.0).active()} for name, p in PRESETS.items()}
    assert modes == {
        "lora": {"B": "lora"},
        "bitfit": {"E": "vector"},
        "ssf": {"A": "vector", "D": "vector", "E": "vector"},
        "repadapter": {"A": "lora", "C": "vector"},
        "ia3_like": {"A": "vector"},
        "hira": {"A": "lora"},
        "lossless4": {"A": "block", "C": "vector", "E": "vector"},
    }
    assert PRESET_COMPOSITION == {"repadapter": "product", "hira": "hadamard"}
    assert [slot for slot, _ in make_path(DEFAULT_SLOTS, 4, 4.0).active()] == ["A", "B", "C", "E"]
