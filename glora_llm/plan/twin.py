"""A dense model of a given saved size: the width, or the depth, of a model's shape is solved for and then counted.

The honest rival of a model whose layers share weights is a dense model whose file is as large. The number of parameters
P of a transformer of hidden size h, feed-forward size f and L like layers is a polynomial,

    P = a + b h + c h^2 + d h f + e f      by width, L fixed
    P = a + b L + c L f                    by depth, h fixed

so P of a few small models on the meta device gives its coefficients, f follows from the size that is wanted, and the
module that comes out is built and counted. Heads keep their size as nearly as can be, and their grouping.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from glora_llm.errors import UserError
from glora_llm.models.families import auto_class

BYTES = 4  # of a parameter in RUN/model: float32
FARTHEST = 0.02  # share of the size wanted by which a twin may miss it
WIDEST = 4  # times the width or depth of the shape: as far as is looked
FEED_FORWARD = ("intermediate_size", "n_inner", "ffn_dim")  # as families call f
SHAPE = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers")


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that a twin may change.

    Args:
        hidden: h.
        heads, groups: of queries, and of keys and values.
        layers: L.
        feed_forward: f.
    """

    hidden: int
    heads: int
    groups: int
    layers: int
    feed_forward: int

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Read the shape of a configuration.

        Raises:
            UserError: for a family that does not say these sizes as one number each.
        """
        values: list[Any] = [
            getattr(config, name, None) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
        ]
        if not all(type(value) is int for value in values):
            raise UserError(
                f"A {config.model_type} has no single hidden_size, num_attention_heads and num_hidden_layers, which a "
                "twin is solved by. Give a family of like layers, such as llama."
            )
        hidden, heads, layers = values
        name = feed_forward_name(config)
        groups = getattr(config, "num_key_value_heads", None) or heads
        return cls(hidden, heads, groups, layers, getattr(config, name) or 4 * hidden)

    @property
    def head_dim(self) -> int:
        """The size of a head."""
        return self.hidden // self.heads

    def put_into(self, config: Any) -> Any:
        """Return a copy of a configuration with these sizes."""
        made = copy.deepcopy(config)
        made.hidden_size, made.num_attention_heads, made.num_hidden_layers = self.hidden, self.heads, self.layers
        setattr(made, feed_forward_name(config), self.feed_forward)
        if getattr(config, "num_key_value_heads", None) is not None:
            made.num_key_value_heads = self.groups
        if getattr(config, "head_dim", None) is not None:
            made.head_dim = self.head_dim
        if getattr(config, "layer_types", None) is not None:
            kinds = list(config.layer_types)
            made.layer_types = [kinds[number % len(kinds)] for number in range(self.layers)]
        return made


@dataclass(frozen=True)
class Twin:
    """A dense model of a given size.

    Args:
        shape: of the twin.
        parameters: of the module itself, counted.
        wanted: the parameters that were asked for.
        settings: configuration key -> value, of the keys that differ from the model that it is the twin of.
    """

    shape: Shape
    parameters: int
    wanted: int
    settings: dict[str, int]

    @property
    def difference(self) -> float:
        """The parameters above (or below) those wanted, as a share of them."""
        return self.parameters / self.wanted - 1


def feed_forward_name(config: Any) -> str:
    """Return the key of f.

    Raises:
        UserError: for a family without one.
    """
    for name in FEED_FORWARD:
        if hasattr(config, name):
            return name
    raise UserError(
        f"A {config.model_type} has none of {', '.join(FEED_FORWARD)}, which a twin is solved by. Give another family."
    )


def count(config: Any) -> int:
    """Return the parameters of a configuration's dense module, tied ones once, by building it on the meta device."""
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def find_twin(config: Any, wanted: int, by: str = "width", multiple: int = 8) -> Twin:
    """Return the dense model of `wanted` parameters whose shape is nearest to a configuration's.

    By width the number of layers stays and the hidden size changes, by depth the other way round; the feed-forward
    size, free but for `multiple`, takes up what is left. Among those that come within a step of it of the size wanted
    the one is taken whose feed-forward size stands to its hidden size as before, and whose heads are as large.

    Args:
        config: of a model with like layers.
        wanted: parameters.
        by: `width` or `depth`.
        multiple: of which the feed-forward size, and by width the size of a head, are multiples (heads: of 2 at least).

    Raises:
        UserError: when no such model comes within 2 %; it names the nearest. Or when no width has such heads.
    """
    before = Shape.of(config)
    candidates = _by_width(config, before, multiple) if by == "width" else _by_depth(config, before)
    chosen = _chosen(candidates, wanted, multiple)
    made = chosen.put_into(config)
    twin = Twin(chosen, count(made), wanted, _changed(config, made))
    if abs(twin.difference) > FARTHEST:
        sizes = ", ".join(f"{name} {value}" for name, value in twin.settings.items())
        raise UserError(
            f"No dense {config.model_type} of this {'depth' if by == 'width' else 'width'} has {wanted:,} parameters "
            f"({BYTES * wanted:,} bytes). The nearest has {twin.parameters:,} ({BYTES * twin.parameters:,} bytes): "
            f"{sizes or 'the shape as it is'}. Ask for that by --bytes, or solve by "
            f"{'depth' if by == 'width' else 'width'}."
        )
    return twin


@dataclass(frozen=True)
class _Candidate:
    """A shape whose feed-forward size is open: P = fixed + slope f, and how far it is from the model's shape."""

    shape: Shape
    fixed: float
    slope: float
    ratio: float  # of f, where the shape is as before
    distance: float


def _by_width(config: Any, before: Shape, multiple: int) -> Iterator[_Candidate]:
    queries = before.heads // before.groups
    step = math.lcm(2, multiple)
    points = [(size, f) for size in (1, 2, 3) for f in (multiple, 2 * multiple)]
    counts, rows = [], []
    for size, f in points:
        shape = Shape(queries * step * size, queries, 1, before.layers, f)
        h = shape.hidden
        rows.append([1, h, h * h, h * f, f])
        counts.append(count(shape.put_into(config)))
    a, b, c, d, e = _solved(rows, counts)
    for hidden in range(queries * step, WIDEST * before.hidden + 1, step):
        heads = _heads(hidden, before, queries, step)
        if heads is not None:
            shape = Shape(hidden, heads, heads // queries, before.layers, 0)
            apart = 0.1 * abs(math.log(shape.head_dim / before.head_dim))
            ratio = before.feed_forward * hidden / before.hidden
            yield _Candidate(shape, a + b * hidden + c * hidden**2, d * hidden + e, ratio, apart)


def _heads(hidden: int, before: Shape, queries: int, step: int) -> int | None:
    """Return the number of heads of a width by which their size is nearest to the one before; None: none divides it."""
    numbers = [n for n in range(queries, hidden // 2 + 1, queries) if hidden % n == 0]
    fits = [n for n in numbers if hidden // n % step == 0 or hidden // n == before.head_dim]
    return min(fits, key=lambda n: abs(math.log(hidden / n / before.head_dim)), default=None)


def _by_depth(config: Any, before: Shape) -> Iterator[_Candidate]:
    rows, counts = [], []
    for layers, f in ((1, 8), (2, 8), (2, 16)):
        rows.append([1, layers, layers * f])
        shape = Shape(before.hidden, before.heads, before.groups, layers, f)
        counts.append(count(shape.put_into(config)))
    a, b, c = _solved(rows, counts)
    for layers in range(1, WIDEST * before.layers + 1):
        shape = Shape(before.hidden, before.heads, before.groups, layers, 0)
        yield _Candidate(shape, a + b * layers, c * layers, before.feed_forward, 0.0)


def _solved(rows: Sequence[Sequence[float]], counts: Sequence[int]) -> list[float]:
    """Return the coefficients of P, of as many points as there are or one more."""
    solution: list[float] = np.linalg.lstsq(np.array(rows, float), np.array(counts, float), rcond=None)[0].tolist()
    return solution


def _chosen(candidates: Iterable[_Candidate], wanted: int, multiple: int) -> Shape:
    """Give each candidate the feed-forward size that comes nearest, and return the best one's shape."""
    best: tuple[tuple[bool, float], Shape] | None = None
    for one in candidates:
        f = max(multiple, multiple * round((wanted - one.fixed) / one.slope / multiple))
        miss = abs(one.fixed + one.slope * f - wanted)
        is_far = miss > 0.501 * one.slope * multiple
        rank = (is_far, miss if is_far else abs(math.log(f / one.ratio)) + one.distance)
        if best is None or rank < best[0]:
            best = (rank, replace(one.shape, feed_forward=f))
    if best is None:  # of widths alone
        raise UserError(
            f"No hidden size up to {WIDEST} times the model's has heads whose size is a multiple of {multiple}. Give a "
            "smaller --multiple."
        )
    return best[1]


def _changed(config: Any, made: Any) -> dict[str, int]:
    """Return the keys, as the family names them, that differ."""
    names = [*SHAPE, feed_forward_name(config)]
    pairs = {name: (getattr(config, name, None), getattr(made, name, None)) for name in names}
    changed = {name: new for name, (old, new) in pairs.items() if old != new and new is not None}
    return {config.attribute_map.get(name, name): new for name, new in changed.items()}
