"""Search strategies. A strategy is a generator: it yields an `Ask`, candidates and rows, and is sent their scores.

Given the same seed and the same scores a strategy asks the same, so a search that was killed is simply run again:
known scores are answered from the journal.
"""

from collections.abc import Callable, Collection, Generator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glora_llm.registry import Registry
from glora_llm.schema import SearchSection
from glora_llm.search.space import Code, Space

Values = NDArray[np.float64]


class Ask(NamedTuple):
    """Candidates whose rows are to be scored, or whose slopes over these rows are asked for."""

    codes: list[Code]
    rows: NDArray[np.int64]  # numbers of rows, the same for all candidates
    generation: int
    slopes: bool = False


# Is sent scores, (candidates, rows), higher is better; or the slopes it asked for, (candidates, G, choices).
Strategy = Generator[Ask, Values, None]
MakeStrategy = Callable[[Space, SearchSection, float, int], Strategy]  # space, settings, limit, number of rows
STRATEGIES: Registry[MakeStrategy] = Registry("search strategy")


@STRATEGIES.register("random")
def search_at_random(space: Space, settings: SearchSection, limit: float, rows: int) -> Strategy:
    """Score `passes` random genomes on all rows."""
    rng = np.random.default_rng(settings.seed)
    for generation in range(0, settings.passes, settings.population):
        count = min(settings.population, settings.passes - generation)
        codes = [space.random(rng, limit) for _ in range(count)]
        yield Ask(codes, np.arange(rows), generation // settings.population)


@STRATEGIES.register("evolution")
def evolve(space: Space, settings: SearchSection, limit: float, rows: int) -> Strategy:
    """Search by evolution as in the GLoRA paper (arXiv 2306.07967, section 3.3): score every candidate on all rows.

    A random population; then in each generation half as many mutations of the parents and half as many crossovers of
    two of them. Parents are the best of all candidates so far.
    """
    rng = np.random.default_rng(settings.seed)
    seen: dict[bytes, tuple[float, Code]] = {}
    fresh = _new(settings.population, (), lambda: space.random(rng, limit))
    for generation in range(settings.generations + 1):
        values = yield Ask(fresh, np.arange(rows), generation)
        seen |= {code.tobytes(): (float(v), code) for code, v in zip(fresh, values.mean(1), strict=True)}
        best = sorted(seen.values(), key=lambda entry: (-entry[0], entry[1].tobytes()))[: settings.parents]
        fresh = _children(space, settings, limit, rng, [code for _, code in best], seen)
        if not fresh:
            return


def _children(
    space: Space,
    settings: SearchSection,
    limit: float,
    rng: np.random.Generator,
    parents: list[Code],
    seen: Collection[bytes],
) -> list[Code]:
    def parent() -> Code:
        return parents[rng.integers(len(parents))]

    half = settings.population // 2
    mutated = _new(half, seen, lambda: space.mutate(parent(), rng, limit, settings.mutation_probability))
    taken = {*seen, *(code.tobytes() for code in mutated)}
    return mutated + _new(settings.population - half, taken, lambda: space.cross(parent(), parent(), rng, limit))


def _new(count: int, seen: Collection[bytes], draw: Callable[[], Code]) -> list[Code]:
    """Return up to `count` codes that are not known yet; a small space may have fewer."""
    found: dict[bytes, Code] = {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        code = draw()
        if code.tobytes() not in seen:
            found.setdefault(code.tobytes(), code)
    return list(found.values())
