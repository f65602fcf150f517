"""The supernet's draws: a function of what they are named by, even, and allowed."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from torch import nn

from glora_llm.glora import GLoRAConfig, GLoRALinear
from glora_llm.glora.path import LayerPath, SlotSpec
from glora_llm.glora.path_sampler import Supernet, draw_path
from glora_llm.glora.supernet import largest_path, slot_choices, smallest_path
from glora_llm.schema.slots import SUPERNET_MODES

CHOICES = slot_choices(None, [8, 4, 2], 16.0)
NAMES = [f"model.layers.{number}.{name}" for number in range(4) for name in ("q_proj", "up_proj")]


def supernet(seed: int = 0, modes: dict[str, list[str]] | None = None, **options: Any) -> Supernet:
    """Eight layers, of which those of q_proj have a bias."""
    made = {}
    for name in NAMES:
        made[name] = GLoRALinear(nn.Linear(6, 4, bias="q_proj" in name).requires_grad_(False))
        made[name].update_layer("default", GLoRAConfig(supernet={"modes": modes, "ranks": [8, 4, 2]}), LayerPath(()))
    return Supernet(made, seed, **options)


def drawn(net: Supernet, step: int, number: int) -> list[LayerPath]:
    net.draw(step, number)
    return [layer.path["default"] for layer in net.layers.values()]


def test_the_same_names_draw_the_same() -> None:
    """Another process, and one that resumes in the middle, has drawn nothing before."""
    one, other = supernet(seed=3), supernet(seed=3)
    expected = {at: drawn(one, *at) for at in itertools.product(range(3), range(2))}
    for at in reversed(expected):
        assert drawn(other, *at) == expected[at]


def test_a_draw_is_the_one_of_the_last_version() -> None:
    """A run that is resumed by a newer version goes on as it was: the draws are part of its state."""
    path = draw_path(CHOICES, True, 0, 12, 1, "model.layers.0.self_attn.q_proj")
    modes = {"A": "scalar", "B": "scalar", "C": "vector", "E": "scalar"}
    assert path == LayerPath(tuple((slot, SlotSpec(mode)) for slot, mode in modes.items()))


def test_whatever_names_a_draw_changes_it() -> None:
    base = drawn(supernet(), 5, 1)
    others = {
        "step": drawn(supernet(), 6, 1),
        "micro batch": drawn(supernet(), 5, 2),
        "seed": drawn(supernet(seed=1), 5, 1),
        "shifted": drawn(supernet(), 1, 5),
    }
    for one, other in itertools.combinations([base, *others.values()], 2):
        assert sum(a != b for a, b in zip(one, other, strict=True)) >= 6


def test_layers_draw_on_their_own() -> None:
    paths = [draw_path(CHOICES, True, 0, 0, 0, name) for name in (f"layer.{n}" for n in range(40))]
    assert len(set(paths)) > 35


def test_a_layer_without_a_bias_never_draws_d() -> None:
    net = supernet()
    with_d: Counter[str] = Counter()
    for step in range(30):
        for name, path in zip(NAMES, drawn(net, step, 0), strict=True):
            with_d[name.rpartition(".")[2]] += path["D"].mode != "none"
    assert with_d["up_proj"] == 0 and with_d["q_proj"] > 40


def chi_square(counts: Counter[Any], wanted: int) -> float:
    """Squared distance from even, in standard deviations of a chi-square of `wanted` - 1 degrees; all must be there."""
    assert len(counts) == wanted
    expected = sum(counts.values()) / wanted
    chi = sum((seen - expected) ** 2 / expected for seen in counts.values())
    return (chi - (wanted - 1)) / np.sqrt(2 * max(1, wanted - 1))


@pytest.mark.parametrize("stream", ["step", "micro batch", "layer", "seed"])
def test_modes_and_ranks_are_drawn_evenly(stream: str) -> None:
    """Along each of the names that a draw depends on."""
    names = ("seed", "step", "micro batch", "layer")
    paths = [draw_path(CHOICES, True, *[n if name == stream else 7 for name in names]) for n in range(3000)]
    for slot, modes in SUPERNET_MODES.items():
        assert chi_square(Counter(path[slot].mode for path in paths), len(modes)) < 5
        if "lora" in modes:
            assert chi_square(Counter(path[slot].rank for path in paths if path[slot].mode == "lora"), 3) < 5


def test_slots_are_drawn_on_their_own() -> None:
    """Two slots of one layer have every pair of modes equally often."""
    paths = [draw_path(CHOICES, True, 0, step, 0, "layer") for step in range(4000)]
    for one, other in itertools.combinations(SUPERNET_MODES, 2):
        pairs = Counter((path[one].mode, path[other].mode) for path in paths)
        assert chi_square(pairs, len(SUPERNET_MODES[one]) * len(SUPERNET_MODES[other])) < 5


def test_every_draw_is_allowed() -> None:
    net = supernet(modes={"A": ["lora"], "B": ["vector", "none"], "E": ["none"]})
    allowed = slot_choices({"A": ["lora"], "B": ["vector", "none"], "E": ["none"]}, [8, 4, 2], 16.0)
    for step in range(50):
        for name, path in zip(NAMES, drawn(net, step, 0), strict=True):
            assert all(path[slot] in specs for slot, specs in allowed.items() if slot != "D" or "q_proj" in name)
            assert path["A"].mode == "lora" and path["A"].scale == 16.0 / 8 and "none" not in str(path.slots)


def test_the_largest_path_is_the_first_choice_of_every_slot() -> None:
    net = supernet()
    net.draw(0, 0)
    net.largest()
    for name, layer in net.layers.items():
        wanted = {slot: specs[0] for slot, specs in CHOICES.items() if slot != "D" or "q_proj" in name}
        assert dict(layer.path["default"].slots) == wanted
        assert wanted["A"] == SlotSpec("lora", 8, 2.0) and wanted["E"] == SlotSpec("vector")


def test_even_ranks_have_scales_of_their_own() -> None:
    """As each would have alone; in plain scaling all have that of the largest, and a smaller one is a truncation."""
    for even, scales in ((False, [2.0, 2.0, 2.0]), (True, [2.0, 4.0, 8.0])):
        found = slot_choices({"A": ["lora", "vector"]}, [2, 8, 4], 16.0, even)["A"]
        assert found == (*(SlotSpec("lora", r, s) for r, s in zip((8, 4, 2), scales, strict=True)), SlotSpec("vector"))


def test_a_sandwich_has_the_largest_and_the_smallest_path_in_turns() -> None:
    """Counted through the run, not the step; every slot acts in the smallest; the others are drawn as before."""
    net, plain = supernet(sandwich=3, micro_batches=2), supernet()
    for step, number in itertools.product(range(6), range(2)):
        turn, paths = (2 * step + number) % 3, drawn(net, step, number)
        for name, path in zip(NAMES, paths, strict=True):
            has_bias = "q_proj" in name
            if turn == 0:
                assert path == largest_path(CHOICES, has_bias)
            if turn == 1:
                assert path == smallest_path(CHOICES, has_bias)
                assert {slot: spec.mode for slot, spec in path.slots if slot != "D"} == {
                    **dict.fromkeys("ABE", "scalar"),
                    "C": "vector",
                }
        assert net.is_largest == (turn == 0)
        if turn == 2:
            assert paths == drawn(plain, step, number)
    ranks = slot_choices({"B": ["lora"], **{slot: ["none"] for slot in "ACDE"}}, [8, 4, 2], 16.0)
    assert smallest_path(ranks, True) == LayerPath((("B", SlotSpec("lora", 2, 2.0)),))


def test_odds_say_how_often_a_mode_is_drawn() -> None:
    odds = {"A": {"lora": 3.0, "scalar": 0.0}, "E": {"none": 2.0}}
    paths = [draw_path(CHOICES, True, 0, step, 0, "layer", odds=odds) for step in range(4000)]
    plain = [draw_path(CHOICES, True, 0, step, 0, "layer") for step in range(10)]
    counts = Counter(path["A"].mode for path in paths)
    assert counts["scalar"] == 0
    for mode, share in (("lora", 0.6), ("vector", 0.2), ("none", 0.2)):
        assert abs(counts[mode] / 4000 - share) < 5 * (share * (1 - share) / 4000) ** 0.5
    assert abs(Counter(path["E"].mode for path in paths)["none"] / 4000 - 0.5) < 0.04
    assert chi_square(Counter(path["B"].mode for path in paths), 4) < 5, "a slot without odds is drawn as it was"
    assert draw_path(CHOICES, True, 0, 3, 0, "layer", odds={}) == plain[3]


def test_the_teacher_is_the_largest_path_for_a_while() -> None:
    net = supernet(sandwich=4)
    for number, is_largest in ((0, True), (2, False)):
        before = drawn(net, 0, number)
        with net.as_teacher() as is_teacher:
            inside = [layer.path["default"] for layer in net.layers.values()]
        assert is_teacher == is_largest
        assert inside == [largest_path(CHOICES, "q_proj" in name) for name in NAMES]
        assert [layer.path["default"] for layer in net.layers.values()] == before
