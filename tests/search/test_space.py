"""What may be chosen: what it costs, that limits are kept, and codes as genomes."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from torch import nn

from glora_llm.errors import UserError
from glora_llm.glora import GLoRAConfig, GLoRALinear
from glora_llm.glora.path import Genome, LayerPath, SlotSpec, make_path
from glora_llm.glora.supernet import slot_choices
from glora_llm.search.space import Code, LayerShape, Space, space_of
from tests.search.conftest import is_legal, layers, make_space, require_impossible, settings, smallest

VARIANTS = [("product", True), ("product", False), ("hadamard", True), ("hadamard", False)]
EVEN = 5.0  # standard deviations


def allocated(layer: LayerShape, path: LayerPath, composition: str) -> int:
    """Number of the elements that a plain layer trains on a path."""
    base = nn.Linear(layer.in_features, layer.out_features, bias=layer.has_bias).requires_grad_(False)
    linear = GLoRALinear(base)
    linear.update_layer("default", GLoRAConfig(composition=composition), path)
    linear.set_adapter("default")
    return sum(p.numel() for p in linear.parameters() if p.requires_grad)


@pytest.mark.parametrize(("composition", "has_bias"), VARIANTS)
def test_a_choice_costs_what_it_allocates(composition: str, has_bias: bool) -> None:
    space = make_space(1, composition, has_bias)
    assert len(space.genes) == (5 + 4 + 5 if has_bias else 3 * 4)
    for row, gene in enumerate(space.genes):
        for choice, spec in enumerate(gene.specs):
            path = LayerPath(((gene.slot, spec),) if spec.mode != "none" else ())
            expected = allocated(space.layers[gene.layer], path, composition)
            assert space.parameters[row, choice] == expected
            assert (expected == 0) == (spec.mode == "none")
        assert np.isinf(space.parameters[row, len(gene.specs) :]).all()


def test_the_composition_changes_what_a_costs() -> None:
    by_composition = [make_space(1, composition).parameters.copy() for composition in ("product", "hadamard")]
    for costs in by_composition:
        costs[np.isinf(costs)] = 0
    assert (by_composition[0] != by_composition[1]).sum() == 2 * 3  # A lora of three ranks, where O is not I


@pytest.mark.parametrize(("composition", "has_bias"), VARIANTS)
def test_the_size_of_a_code_is_what_its_genome_allocates(composition: str, has_bias: bool) -> None:
    space, rng = make_space(2, composition, has_bias), np.random.default_rng(0)
    for _ in range(10):
        code = space.random(rng, float("inf"))
        genome = space.genome(code)
        made = sum(allocated(layer, genome[layer.name], composition) for layer in space.layers)
        assert space.size(code) == space.cost(code) == made > 0


def spaces_and_limits() -> Iterator[Any]:
    """Spaces with and without mode none, each at several limits, the tightest one of which is just possible."""
    for name, modes in {"all": {}, "no none": {"A": ["lora", "vector"], "E": ["vector", "scalar"]}}.items():
        space = make_space(**modes)
        least, most = smallest(space), float(np.where(np.isfinite(space.costs), space.costs, 0).max(1).sum())
        for share in (0.0, 0.01, 0.1, 0.5, 1.0):
            yield pytest.param(space, least + share * (most - least), id=f"{name}-{share}")


@pytest.mark.parametrize(("space", "limit"), [*spaces_and_limits()])
def test_every_code_that_leaves_the_space_is_legal(space: Space, limit: float) -> None:
    for seed in range(25):
        rng = np.random.default_rng(seed)
        free = [space.random(rng, float("inf")) for _ in range(2)]
        made = [
            space.random(rng, limit),
            space.mutate(free[0], rng, limit, 0.2),
            space.cross(free[0], free[1], rng, limit),
            space.repair(free[1], rng, limit),
        ]
        assert all(is_legal(space, code, limit) for code in made)
        assert all(code.dtype == np.uint8 for code in made)
    assert limit > smallest(space) or any(space.cost(code) > limit for code in free)


def test_at_the_smallest_limit_one_code_is_left() -> None:
    space = make_space(E=["vector", "scalar"])
    rng, limit = np.random.default_rng(0), smallest(space)
    found = {space.random(rng, limit).tobytes() for _ in range(20)}
    assert limit == len(space.layers) and found == {space.costs.argmin(1).astype(np.uint8).tobytes()}


def test_what_is_legal_is_left_alone() -> None:
    space, rng = make_space(), np.random.default_rng(1)
    code = space.random(rng, float("inf"))
    kept = code.copy()
    assert np.array_equal(space.repair(code, rng, space.cost(code)), kept)
    space.repair(code, rng, smallest(space))
    assert np.array_equal(code, kept), "a repair changes a copy"
    assert np.array_equal(space.mutate(code, rng, float("inf"), 0.0), kept)


def test_a_mutation_changes_its_share_of_the_genes() -> None:
    """A gene drawn anew may fall on what it was: of a mode that is drawn with odds p, with odds p."""
    space, rng = make_space(), np.random.default_rng(2)
    code = np.zeros(len(space.genes), np.uint8)  # lora of rank 8, or vector
    changed = np.mean([space.mutate(code, rng, float("inf"), 0.3) != code for _ in range(400)], axis=0)
    same = np.array([1 / len({s.mode for s in g.specs}) / (3 if g.specs[0].mode == "lora" else 1) for g in space.genes])
    expected = 0.3 * (1 - same)
    assert (np.abs(changed - expected) < EVEN * np.sqrt(expected * (1 - expected) / 400)).all()


def test_uniform_codes_are_all_paths_within_the_limit() -> None:
    space = make_space(2, "product", False)
    codes = space.uniforms(float("inf"))
    assert len({code.tobytes() for code in codes}) == len(codes) == 6 * 6 * 5 * 3
    for code in codes[::17]:
        (path,) = set(space.genome(code).values())
        assert np.array_equal(space.code({layer.name: path for layer in space.layers}), code)
    limit = float(np.median([space.cost(code) for code in codes]))
    assert {c.tobytes() for c in space.uniforms(limit)} == {c.tobytes() for c in codes if space.cost(c) <= limit}
    assert len(make_space(A=["vector"]).uniforms(0.0)) == 0


def test_groups_are_a_slot_at_a_place() -> None:
    """In the whole model, in a kind of linear, at a depth, in a layer: 5, 14, 15 and 42 of them in three layers."""
    space = make_space()
    assert [int(groups.max()) + 1 for groups in space.levels] == [5, 3 * 4 + 2, 3 * 5, len(space.genes)]
    names = [space.layers[gene.layer].name for gene in space.genes]
    places = [("", name.split(".", 3)[3], name.split(".")[2], name) for name in names]
    for place, groups in enumerate(space.levels):
        for group in range(int(groups.max()) + 1):
            members = np.flatnonzero(groups == group)
            assert len({space.genes[i].slot for i in members}) == 1
            assert len({places[i][place] for i in members}) == 1
            others = [i for i in np.flatnonzero(groups != group) if space.genes[i].slot == space.genes[members[0]].slot]
            assert places[members[0]][place] not in [places[i][place] for i in others]


def test_what_is_mutated_alike_is_drawn_by_the_same_odds_and_differs_more_in_sum() -> None:
    """Of each gene; but the number of slots that hold a choice varies far more than where each is drawn by itself."""
    space, rng, count = make_space(12), np.random.default_rng(6), 1500
    start = space.random(rng, float("inf"))
    alike = np.array([space.mutate_alike(start, rng, float("inf"), 1.0) for _ in range(count)])
    alone = np.array([space.random(rng, float("inf")) for _ in range(count)])
    for row, gene in enumerate(space.genes):
        shares = [np.bincount(codes[:, row], minlength=len(gene.specs)) / count for codes in (alike, alone)]
        assert np.abs(shares[0] - shares[1]).max() < EVEN * np.sqrt(0.5 / count)
    of_a = [row for row, gene in enumerate(space.genes) if gene.slot == "A"]
    none = len(space.choices["A"]) - 1
    assert (alike[:, of_a] == none).sum(1).var() > 4 * (alone[:, of_a] == none).sum(1).var()


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_groups_that_are_not_drawn_stay(probability: float) -> None:
    space, rng = make_space(), np.random.default_rng(7)
    code = space.random(rng, float("inf"))
    changed = [space.mutate_alike(code, rng, float("inf"), probability) != code for _ in range(400)]
    assert 0 <= np.mean(changed) <= probability
    assert (np.mean(changed) > probability / 3) == (probability > 0)


def test_a_child_takes_every_gene_from_a_parent() -> None:
    space, rng = make_space(), np.random.default_rng(3)
    one, other = (space.random(rng, float("inf")) for _ in range(2))
    children = np.array([space.cross(one, other, rng, float("inf")) for _ in range(200)])
    assert ((children == one) | (children == other)).all()
    differ = one != other
    assert differ.sum() > 10
    shares = (children == one)[:, differ].mean(0)
    assert (np.abs(shares - 0.5) < EVEN * 0.5 / np.sqrt(200)).all()


def test_a_random_code_draws_modes_evenly_and_then_ranks() -> None:
    space, rng, count = make_space(1), np.random.default_rng(4), 3000
    codes = np.array([space.random(rng, float("inf")) for _ in range(count)])
    for row, gene in enumerate(space.genes):
        modes = [spec.mode for spec in gene.specs]
        expected = count * np.array([1 / len(set(modes)) / modes.count(mode) for mode in modes])
        seen = np.bincount(codes[:, row], minlength=len(modes))
        chi = float(((seen - expected) ** 2 / expected).sum())
        degrees = len(modes) - 1
        assert chi < degrees + EVEN * np.sqrt(2 * degrees)


@pytest.mark.parametrize("less", [0.5, 1, 300])
def test_a_limit_that_is_too_low_names_the_smallest(less: float) -> None:
    space = make_space(60, A=["vector"], B=["lora"])
    least = smallest(space)
    assert least == 60 * (8 + 16 + 8) + 60 * 2 * (16 + 24 + 24)
    space.require_limit(least, "least")
    said = require_impossible(space, least - less, "0.1k")
    assert "search.budget 0.1k is below the smallest genome, which has 9,600: " in said
    assert "Raise the budget, or allow mode none" in said


def test_a_space_with_none_everywhere_allows_any_limit() -> None:
    make_space().require_limit(0.0, "0")
    assert "which has 0" in require_impossible(make_space(), -1.0, "-1")


def test_codes_and_genomes_are_the_same() -> None:
    space, rng = make_space(), np.random.default_rng(5)
    codes = [space.random(rng, float("inf")) for _ in range(50)]
    codes += [np.full(len(space.genes), 0, np.uint8), np.array([len(g.specs) - 1 for g in space.genes], np.uint8)]
    for code in codes:
        genome = space.genome(code)
        assert list(genome) == [layer.name for layer in space.layers]
        assert np.array_equal(space.code(genome), code)
        for gene, choice in zip(space.genes, code, strict=True):
            assert genome[space.layers[gene.layer].name][gene.slot] == gene.specs[choice]
        assert all("D" not in dict(path.slots) for name, path in genome.items() if "up_proj" in name)
    assert len({str(space.genome(code)) for code in codes}) == len({code.tobytes() for code in codes})


def test_a_layer_that_a_genome_leaves_out_has_no_slot() -> None:
    space = make_space()
    code = space.code({"model.layers.1.mlp.up_proj": make_path({"E": "vector"}, 1, 1.0)})
    assert [space.genome(code)[layer.name].slots for layer in space.layers if "1.mlp.up" not in layer.name] == [()] * 8
    assert space.size(code) == 16


@pytest.mark.parametrize(
    ("genome", "message"),
    [
        ({"model.layers.1.mlp.up_prj": LayerPath(())},
         "genome: there is no adapted layer 'model.layers.1.mlp.up_prj' among the 9 of this model, such as "
         "model.layers.0.self_attn.q_proj. Did you mean 'model.layers.1.mlp.up_proj'?"),
        ({"model.layers.0.mlp.up_proj": LayerPath((("B", SlotSpec("lora", 3, 2.0)),))},
         "genome: slot B of model.layers.0.mlp.up_proj cannot be lora of rank 3; this supernet has: lora of rank 8, "
         "lora of rank 4, lora of rank 2, vector, scalar, none. Did you mean 'lora of rank "),
        ({"model.layers.0.mlp.up_proj": LayerPath((("A", SlotSpec("vector")),))},
         "genome: slot A of model.layers.0.mlp.up_proj cannot be vector; this supernet has: scalar, none."),
    ],
)  # fmt: skip
def test_a_genome_that_does_not_fit_names_the_nearest(genome: Genome, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make_space(A=["scalar", "none"]).code(genome)


def test_one_path_for_all_layers() -> None:
    space = make_space()
    slots = {"B": {"mode": "lora", "rank": 4, "alpha": 8.0}, "D": "vector", "E": "scalar"}
    path = make_path(slots, 8, 16.0)
    found = [space.genome(code) for code in space.uniforms(float("inf"))]
    (genome,) = [genome for genome in found if path in genome.values()]
    assert {name: p for name, p in genome.items() if "up_proj" in name} == {
        f"model.layers.{n}.mlp.up_proj": path.without("D") for n in range(3)
    }
    assert all(p == path for name, p in genome.items() if "up_proj" not in name)


def supernet_layers(modes: dict[str, list[str]]) -> dict[str, GLoRALinear]:
    config = GLoRAConfig(supernet={"ranks": [4, 2], "modes": modes}, composition="hadamard")
    made = {}
    for name, out_features, in_features, has_bias in layers(2):
        made[name] = GLoRALinear(nn.Linear(in_features, out_features, bias=has_bias).requires_grad_(False))
        made[name].update_layer("default", config, LayerPath(()))
    return made


def test_the_space_of_a_supernet_is_what_its_layers_may_be() -> None:
    found = space_of(supernet_layers({"A": ["lora", "none"]}), settings())
    expected = Space(layers(2), slot_choices({"A": ["lora", "none"]}, [4, 2], 16.0), "hadamard")
    assert found.layers == expected.layers and found.genes == expected.genes
    assert np.array_equal(found.parameters, expected.parameters)


def test_the_space_of_a_supernet_refuses_what_no_genome_keeps() -> None:
    made = supernet_layers({"E": ["vector"]})
    assert smallest(space_of(made, settings(budget=64))) == 64
    with pytest.raises(UserError, match=r"search\.budget 63 is below the smallest genome, which has 64"):
        space_of(made, settings(budget=["1k", "63"]))


def test_a_limit_may_be_on_something_else_than_parameters() -> None:
    space = Space(layers(2), slot_choices(None, [8, 2], 16.0), "product", lambda *given: float(given[2].mode == "lora"))
    rng = np.random.default_rng(6)
    found: list[Code] = [space.random(rng, 3.0) for _ in range(30)]
    counts = [sum(s.mode == "lora" for p in space.genome(c).values() for _, s in p.active()) for c in found]
    assert max(counts) == 3 and counts == [space.cost(code) for code in found]
    assert max(space.size(code) for code in found) > 100
