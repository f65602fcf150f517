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
from glora_llm.glora.supernet import slot_choices
from glora_llm.schema.slots import SUPERNET_MODES

CHOICES = slot_choices(None, [8, 4, 2], 16.0)
NAMES = [f"model.layers.{number}.{name}" for number in range(4) for name in ("q_proj", "up_proj")]


def supernet(seed: int = 0, modes: dict[str, list[str]] | None = None) -> Supernet:
    """Eight layers, of which those of q_proj have a bias."""
    made = {}
    for name in NAMES:
        made[name] = GLoRALinear(nn.Linear(6, 4, bias="q_proj" in name).requires_grad_(False))
        made[name].update_layer("default", GLoRAConfig(supernet={"modes": modes, "ranks": [8, 4, 2]}), LayerPath(()))
    return Supernet(made, seed)


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
