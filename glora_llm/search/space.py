"""The search space: for every layer and slot one of its modes (and ranks), coded as small integers.

A layer is a linear with GLoRA's slots, or a block with NOAH's.

A *code* is a uint8 array (G,) with one gene for every (layer, slot); G is layers x slots. The cost of a code is a sum
over its genes of a table, so limits on parameters, time and memory are all kept by the same few lines, and every code
that leaves this module is within its limit.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glora_llm.errors import UserError, nearest
from glora_llm.glora.modes import slot_numel
from glora_llm.glora.path import Genome, LayerPath, SlotSpec
from glora_llm.glora.supernet import SearchedLayer, SlotChoices, require_known, slots_of
from glora_llm.schema import SearchSection
from glora_llm.schema.slots import SIZED_MODES
from glora_llm.search.limits import limits

Code = NDArray[np.uint8]
LEANING = 0.5  # of a Dirichlet distribution: the lower, the more alike are the genes of a group


class LayerShape(NamedTuple):
    """One adapted linear."""

    name: str
    out_features: int
    in_features: int
    has_bias: bool


class Gene(NamedTuple):
    """One slot of one layer, and its choices."""

    layer: int
    slot: str
    specs: tuple[SlotSpec, ...]


Value = Callable[[LayerShape, str, SlotSpec], float]


class Space:
    """All genomes of a supernet.

    Args:
        layers: the adapted linears, in a fixed order.
        choices: slot -> its choices.
        composition: of A in mode lora.
        cost: (layer, slot, spec) -> cost of the slot, in the unit of the limit; None: trainable parameters.
        numel: (layer, slot, spec) -> trainable parameters of the slot; None: those of GLoRA's slots.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        choices: SlotChoices,
        composition: str,
        cost: Value | None = None,
        numel: Value | None = None,
    ):
        self.layers, self.choices, self.composition = tuple(layers), choices, composition
        self.genes = [
            Gene(index, slot, choices[slot])
            for index, layer in enumerate(self.layers)
            for slot in slots_of(choices, layer.has_bias)
        ]
        widest = max(len(gene.specs) for gene in self.genes)
        self.parameters = self._table(widest, numel or self._numel)
        self.costs = self.parameters if cost is None else self._table(widest, cost)
        self._odds = self._table(widest, lambda _, slot, spec: _odds(choices[slot], spec), missing=0.0)
        self._cumulative = self._odds.cumsum(1) / self._odds.sum(1, keepdims=True)
        self._last = np.array([len(gene.specs) - 1 for gene in self.genes], np.uint8)
        self.levels = [self._groups(level) for level in range(4)]

    def _table(self, widest: int, value: Value, missing: float = np.inf) -> NDArray[np.float64]:
        """Return (G, widest) values of (layer, slot, spec); `missing` where a gene has fewer choices."""
        table = np.full((len(self.genes), widest), missing)
        known: dict[Any, float] = {}  # layers of one shape are alike
        for row, gene in enumerate(self.genes):
            layer = self.layers[gene.layer]
            for column, spec in enumerate(gene.specs):
                key = (layer[1:], gene.slot, spec)
                if key not in known:
                    known[key] = float(value(layer, gene.slot, spec))
                table[row, column] = known[key]
        return table

    def _groups(self, level: int) -> NDArray[np.int64]:
        """Return the number of the group (G,) of each gene: its slot at one of the places of `_places`."""
        ids: dict[object, int] = {}
        keys = [(gene.slot, _places(self.layers[gene.layer].name)[level]) for gene in self.genes]
        return np.array([ids.setdefault(key, len(ids)) for key in keys])

    def _numel(self, layer: LayerShape, slot: str, spec: SlotSpec) -> int:
        return slot_numel(slot, spec, self.composition, layer.out_features, layer.in_features)

    def cost(self, code: Code) -> float:
        """Return the cost of a code, in the unit of the limit."""
        return float(chosen(self.costs, code).sum())

    def size(self, code: Code) -> int:
        """Return the trainable parameters of a code."""
        return int(chosen(self.parameters, code).sum())

    def require_limit(self, limit: float, text: str) -> None:
        """Check that a limit can be kept.

        Raises:
            UserError: when it is below the smallest genome.
        """
        smallest = float(self.costs.min(1).sum())
        if limit < smallest:
            raise UserError(
                f"search.budget {text} is below the smallest genome, which has {smallest:,.6g}: every slot costs at "
                "least that much by adapter.supernet.modes (noah: sizes). Raise the budget, or allow mode none (size "
                "0)."
            )

    def random(self, rng: np.random.Generator, limit: float) -> Code:
        """Draw a code as the supernet draws its paths (a mode, then a rank), made cheaper until it is legal."""
        return self.repair(self._draw(rng), rng, limit)

    def _draw(self, rng: np.random.Generator) -> Code:
        return self._pick(self._cumulative, rng)

    def _pick(self, cumulative: NDArray[np.float64], rng: np.random.Generator) -> Code:
        above = (rng.random((len(self.genes), 1)) > cumulative).sum(1)
        return np.minimum(above, self._last).astype(np.uint8)

    def mutate(self, code: Code, rng: np.random.Generator, limit: float, probability: float) -> Code:
        """Draw each gene anew with a probability."""
        fresh = self._draw(rng)
        return self.repair(np.where(rng.random(len(code)) < probability, fresh, code), rng, limit)

    def mutate_alike(self, code: Code, rng: np.random.Generator, limit: float, probability: float) -> Code:
        """Draw groups of genes anew, each with a probability; the genes of a group mostly draw alike.

        A group is one slot in the whole model, in a kind of linear, at a depth, or in one layer; one of these four
        levels is drawn first. Where every gene is drawn by itself, all codes hold about the same in sum, and none
        of them tells the worth of a slot in general.
        """
        groups = self.levels[rng.integers(len(self.levels))]
        odds = self._odds[np.unique(groups, return_index=True)[1]]
        weights = rng.standard_gamma(LEANING * odds * (odds > 0).sum(1, keepdims=True)) + 1e-9 * odds
        cumulative = (weights / weights.sum(1, keepdims=True)).cumsum(1)
        drawn = rng.random(len(odds)) < probability
        return self.repair(np.where(drawn[groups], self._pick(cumulative[groups], rng), code), rng, limit)

    def cross(self, one: Code, other: Code, rng: np.random.Generator, limit: float) -> Code:
        """Take each gene from one of two parents."""
        return self.repair(np.where(rng.random(len(one)) < 0.5, one, other), rng, limit)

    def repair(self, code: Code, rng: np.random.Generator, limit: float) -> Code:
        """Make random genes cheaper until the code is within the limit (which the cheapest one is)."""
        code, cost = code.copy(), self.cost(code)
        while cost > limit:
            here = chosen(self.costs, code)
            cheaper = self.costs < here[:, None]
            gene = rng.choice(np.flatnonzero(cheaper.any(1)))
            code[gene] = rng.choice(np.flatnonzero(cheaper[gene]))
            cost = self.cost(code)
        return code

    def table(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return (G, choices) of one value for each choice of each gene in turn; 0 where a gene has fewer choices."""
        found = np.zeros(self.parameters.shape)
        found[np.isfinite(self.parameters)] = values
        return found

    def genome(self, code: Code) -> Genome:
        """Return the genome of a code."""
        slots: list[list[tuple[str, SlotSpec]]] = [[] for _ in self.layers]
        for gene, choice in zip(self.genes, code, strict=True):
            spec = gene.specs[choice]
            if spec.mode != "none":
                slots[gene.layer].append((gene.slot, spec))
        return {layer.name: LayerPath(tuple(path)) for layer, path in zip(self.layers, slots, strict=True)}

    def code(self, genome: Mapping[str, LayerPath]) -> Code:
        """Return the code of a genome.

        Raises:
            UserError: for a layer or a mode that this space does not have.
        """
        require_known(dict(genome), [layer.name for layer in self.layers])
        found = np.zeros(len(self.genes), np.uint8)
        for row, gene in enumerate(self.genes):
            spec = genome.get(self.layers[gene.layer].name, LayerPath(()))[gene.slot]
            if spec not in gene.specs:
                names = [_text(other) for other in gene.specs]
                raise UserError(
                    f"genome: slot {gene.slot} of {self.layers[gene.layer].name} cannot be {_text(spec)}; this "
                    f"supernet has: {', '.join(names)}.{nearest(_text(spec), names)}"
                )
            found[row] = gene.specs.index(spec)
        return found

    def uniforms(self, limit: float) -> NDArray[np.uint8]:
        """Return the codes (U, G) within the limit that give every layer the same path."""
        slots = list(dict.fromkeys(gene.slot for gene in self.genes))
        paths = list(itertools.product(*(range(len(self.choices[slot])) for slot in slots)))
        codes = np.array(paths, np.uint8)[:, [slots.index(gene.slot) for gene in self.genes]]
        return codes[chosen(self.costs, codes).sum(1) <= limit]


def chosen(table: NDArray[np.float64], codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the entry of a table (G, C) for each gene of a code (G,), or of several (N, G)."""
    return table[np.arange(len(table)), codes]


def _places(name: str) -> tuple[str, str, str, str]:
    """Return the names of a layer's place at four levels: anywhere, its kind of linear, its depth, itself."""
    depth = next((part for part in name.split(".") if part.isdigit()), name)
    return "", name.rpartition(".")[2], depth, name


def space_of(layers: Mapping[str, SearchedLayer], settings: SearchSection, value: Value | None = None) -> Space:
    """Return the search space of a supernet.

    Args:
        layers: of the supernet, by name.
        value: cost of a slot in the unit of the limit; None: its parameters.

    Raises:
        UserError: when a limit is below the smallest genome, or is no number.
    """
    first = next(iter(layers.values()))
    shapes = [LayerShape(n, layer.out_features, layer.in_features, layer.b0 is not None) for n, layer in layers.items()]

    def numel(shape: LayerShape, slot: str, spec: SlotSpec) -> float:
        return layers[shape.name].slot_numel(slot, spec)

    space = Space(shapes, first.choices["default"], first.composition["default"], value, numel)
    for text, limit in limits(settings).items():
        space.require_limit(limit, text)
    return space


def _text(spec: SlotSpec) -> str:
    return f"{spec.mode} of rank {spec.rank}" if spec.mode in SIZED_MODES else spec.mode


def _odds(specs: Sequence[SlotSpec], spec: SlotSpec) -> float:
    """A mode is drawn first, each alike, then a rank of it."""
    modes = [other.mode for other in specs]
    return 1 / len(set(modes)) / modes.count(spec.mode)
