"""A space of forty genes, and a score over it whose best genome is known."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from glora_llm.errors import UserError
from glora_llm.glora.path import Genome
from glora_llm.glora.supernet import slot_choices
from glora_llm.schema import SearchSection
from glora_llm.search.archive import SLOPE_SAMPLES, Journal
from glora_llm.search.driver import Found, search
from glora_llm.search.space import Code, LayerShape, Space

ROWS = 32
SHAPES = {"self_attn.q_proj": (8, 8), "mlp.up_proj": (16, 8), "mlp.down_proj": (8, 16)}  # (O, I)


def layers(depth: int, has_bias: bool = True) -> list[LayerShape]:
    """The linears of a decoder of some layers; up_proj never has a bias."""
    return [
        LayerShape(f"model.layers.{number}.{name}", *shape, has_bias and "up_proj" not in name)
        for number in range(depth)
        for name, shape in SHAPES.items()
    ]


def make_space(depth: int = 3, composition: str = "product", has_bias: bool = True, /, **modes: Sequence[str]) -> Space:
    """3 x (5 + 4 + 5) = 42 genes at the default depth."""
    return Space(layers(depth, has_bias), slot_choices(modes, [8, 4, 2], 16.0), composition)


def settings(**keys: object) -> SearchSection:
    return SearchSection.model_validate(keys)


class Toy:
    """A score: a sum over genes, a few pairs of genes that interact, and noise that differs by row.

    Over all rows the noise is zero, so the mean of all rows is the truth; over few rows it is as large as the truth.
    Every gene is in one pair at most, so the best genome is known.

    Args:
        space: of the genomes.
        seed: of the score.
        fail_at: raise at this call (from 0), as a kill would end it.
        at_once: genomes of one call.
    """

    def __init__(self, space: Space, seed: int = 0, rows: int = ROWS, fail_at: int | None = None, at_once: int = 1):
        rng = np.random.default_rng(seed)
        self.space, self.fail_at, self.at_once = space, fail_at, at_once
        shape = space.parameters.shape
        self.effects = np.where(np.isfinite(space.parameters), rng.normal(size=shape), -np.inf)
        chosen = rng.permutation(shape[0])[: 2 * min(6, shape[0] // 2)].reshape(-1, 2)
        self.pairs = [(int(a), int(b), rng.normal(0, 0.7, (shape[1], shape[1]))) for a, b in chosen]
        noise = rng.normal(size=(rows, *shape))
        self.noise = noise - noise.mean(0) + rng.normal(0, 20, rows)[:, None, None] / shape[0]
        self.calls: list[int] = []  # genomes of each call
        self.scored: list[tuple[bytes, int]] = []
        self.sloped: list[tuple[bytes, int]] = []

    def truth(self, code: Code) -> float:
        """Return the score over all rows."""
        return float(self.of_rows(code).mean())

    def of_rows(self, code: Code) -> NDArray[np.float64]:
        """Return the score of every row."""
        genes = np.arange(len(code))
        joint = sum(float(table[code[a], code[b]]) for a, b, table in self.pairs)
        found: NDArray[np.float64] = self.noise[:, genes, code].sum(1) + self.effects[genes, code].sum() + joint
        return found

    def best(self) -> Code:
        """The genome of the highest score where nothing is limited."""
        code = self.effects.argmax(1).astype(np.uint8)
        for a, b, table in self.pairs:
            joint = self.effects[a][:, None] + self.effects[b][None, :] + table
            code[a], code[b] = np.unravel_index(joint.argmax(), joint.shape)
        return code

    def __call__(self, requests: Sequence[tuple[Genome, NDArray[np.int64]]]) -> list[NDArray[np.float64]]:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(len(requests))
        found = []
        for genome, rows in requests:
            code = self.space.code(genome)
            self.scored += [(code.tobytes(), int(row)) for row in rows]
            found.append(self.of_rows(code)[rows])
        return found

    def slopes(self, requests: Sequence[tuple[Genome, NDArray[np.int64]]]) -> list[NDArray[np.float64]]:
        """Return first order with half of the rows' noise: it knows the sum, and no pair."""
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(len(requests))
        there, found = np.isfinite(self.effects), []
        for genome, rows in requests:
            code = self.space.code(genome)
            self.sloped += [(code.tobytes(), int(row)) for row in rows]
            found.append((self.first_order() + self.noise[rows].mean(0) / 2)[there])
        return found

    def first_order(self) -> NDArray[np.float64]:
        """Return what slopes over all rows are."""
        return self.effects

    def spent(self) -> int:
        """Row scores so far; a row of slopes counts three."""
        return len(self.scored) + SLOPE_SAMPLES * len(self.sloped)

    def agree(self, text: str) -> bool:
        return bool(text)


def run(toy: Toy, limit: float = float("inf"), journal: Journal | None = None, /, **keys: object) -> Found:
    """Search a toy with a journal in memory, or with the one that is given."""
    return search(toy.space, settings(**keys), limit, toy, journal or Journal(None, {}, len(toy.noise)))


def is_legal(space: Space, code: Code, limit: float) -> bool:
    """Whether a code is one of the space's, within the limit."""
    there = len(code) == len(space.genes) and all(c < len(g.specs) for g, c in zip(space.genes, code, strict=True))
    return there and space.cost(code) <= limit


def smallest(space: Space) -> float:
    return float(space.costs.min(1).sum())


def require_impossible(space: Space, limit: float, text: str) -> str:
    """Return what is said of a limit that is too low."""
    with pytest.raises(UserError) as caught:
        space.require_limit(limit, text)
    return str(caught.value)
