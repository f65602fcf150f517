"""The shape of a VLoRA model: shared linears, layers per base, rank, gains, and the two published forms."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glora_llm.errors import UserError, nearest
from glora_llm.schema.vlora import GAINS, VLORA_CHOICES

FIRST_KEYS = frozenset(  # of version 1 of vlora.json, which has no key `version`
    ("targets", "layers_per_compound", "rank", "alpha", "topology", "base_gradient", "start", "form")
)
VERSION = 2


@dataclass(frozen=True)
class VLoRAConfig:
    """The shape of a VLoRA model. The defaults are the paper's (arXiv 2406.09315).

    The released package (vlora 0.1) is `topology="star", base_gradient="first", start="kaiming"`.

    Args:
        targets: names of the linears inside a layer, whole or by their last parts (`q_proj`); None: all of them.
        layers_per_compound: k, layers that share one base, one for all or target -> k; None: the whole model.
        rank: r, one for all or target -> r.
        alpha: an increment is scaled by s = alpha / r; None: s = 1.
        topology: what a layer's increment is added to: `chain` the previous layer's weight, `star` the base.
        base_gradient: where the base's gradient comes from: `all` layers of its compound, or its `first` layer alone.
        start: `paper`: B = 0 and A Kaiming, so all layers of a compound start equal; `kaiming`: both Kaiming; `small`:
            both random, so that an increment's entries are `start_scale` of the base's in the root mean square.
        form: how a layer is computed: `composed`, `thin`, or `auto`, the cheaper one for each input.
        sharing: the layers of a compound: k `adjacent` ones, or a `cycle`: every (L / k)-th of L layers.
        increments: which layers of a compound add an increment: `next`, all but the first, whose weight is the base;
            or `all`: the base is then a parameter beside the first layer's increment.
        gains: what an increment has beside B A, for all or target -> gains: `row` and `column` factors of the weight
            that it is added to, and a `diagonal` that is added to it. They start without effect.
        start_scale: for `start="small"`.
        norm_spread: standard deviation of the factors, around 1, on the gains that the layers' norms start with.

    Raises:
        UserError: for a word that is none of these, or a number below 1.
    """

    targets: Sequence[str] | None = None
    layers_per_compound: int | Mapping[str, int] | None = 4
    rank: int | Mapping[str, int] = 8
    alpha: float | None = None
    topology: str = "chain"
    base_gradient: str = "all"
    start: str = "paper"
    form: str = "auto"
    sharing: str = "adjacent"
    increments: str = "next"
    gains: Sequence[str] | Mapping[str, Sequence[str]] = ()
    start_scale: float = 0.1
    norm_spread: float = 0.0

    def __post_init__(self) -> None:
        for key, known in VLORA_CHOICES.items():
            _require(key, getattr(self, key), known)
        object.__setattr__(self, "gains", _checked_gains(self.gains))
        if self.increments == "all" and self.base_gradient == "first":
            raise UserError(
                "base_gradient is 'first', and with increments 'all' no layer is the base itself. Use base_gradient "
                "'all', or increments 'next'."
            )
        if self.alpha is not None and not self.alpha > 0:
            raise UserError(f"alpha is {self.alpha}; expected a number above 0, or None for a scaling of 1.")
        if isinstance(self.targets, str):
            raise UserError(f"targets is the text '{self.targets}'; expected a list of names: ['{self.targets}'].")
        _require_positive("rank", self.rank, "expected 1 or more")
        _require_positive("layers_per_compound", self.layers_per_compound, "expected 1 or more, or None for all")
        if not 0 < self.start_scale <= 1:
            raise UserError(f"start_scale is {self.start_scale}; expected a number above 0, at most 1.")
        if not 0 <= self.norm_spread < 1:
            raise UserError(f"norm_spread is {self.norm_spread}; expected 0 or more, below 1.")

    def compound_size(self, layers: int, linear: str) -> int:
        """Return k of a linear in a model of so many layers.

        Raises:
            UserError: when k does not divide them; the message names the sizes that do. Or when there is not one k.
        """
        given = self.layers_per_compound
        size = layers if given is None else one_of(given, linear, "layers_per_compound")
        if layers % size:
            fits = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
            where = f" for '{linear}'" if isinstance(given, Mapping) else ""
            raise UserError(
                f"layers_per_compound is {size}{where}, which does not divide {layers} layers. Sizes that fit: {fits}."
            )
        return size

    def compounds(self, layers: int, linear: str) -> list[range]:
        """Return the numbers of the layers that share each base of a linear.

        Raises:
            UserError: as `compound_size`.
        """
        size = self.compound_size(layers, linear)
        if self.sharing == "cycle":
            count = layers // size
            return [range(first, layers, count) for first in range(count)]
        return [range(first, first + size) for first in range(0, layers, size)]

    def gains_of(self, linear: str) -> tuple[str, ...]:
        """Return the gains of a linear, in the order of `GAINS`."""
        given: Any = self.gains
        if isinstance(given, Mapping):
            given = [gain for target, gains in given.items() if names(linear, target) for gain in gains]
        return tuple(gain for gain in GAINS if gain in given)

    def scale(self, rank: int) -> float:
        """Return s, the factor of an increment of this rank."""
        return 1.0 if self.alpha is None else self.alpha / rank

    def as_json(self) -> dict[str, Any]:
        """Return the values for vlora.json; without the keys of version 2 where they all have their defaults."""
        values = dataclasses.asdict(self)
        new = {key: value for key, value in values.items() if key not in FIRST_KEYS}
        usual = dataclasses.asdict(VLoRAConfig())
        is_first = all(value == usual[key] or not value for key, value in new.items())
        if is_first and not isinstance(self.layers_per_compound, Mapping) and self.start != "small":
            return {key: value for key, value in values.items() if key in FIRST_KEYS}
        return {"version": VERSION, **values}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "VLoRAConfig":
        """Return what `as_json`, of this version or an older one, gave.

        Raises:
            ValueError, TypeError: for a newer version, or values that are none of a configuration.
        """
        values = dict(values)
        version = values.pop("version", 1)
        if type(version) is not int or not 1 <= version <= VERSION:
            raise ValueError(f"it has version {version}, and this program knows versions up to {VERSION}")
        return cls(**values)


def _checked_gains(given: Any) -> tuple[str, ...] | dict[str, tuple[str, ...]]:
    """Return gains as tuples, whatever they were read from."""
    if isinstance(given, Mapping):
        return {target: tuple(_checked_gains(gains)) for target, gains in given.items()}
    if isinstance(given, str):
        raise UserError(f"gains is the text '{given}'; expected a list of names: ['{given}'].")
    for gain in given:
        _require("gains", gain, GAINS)
    if len(set(given)) < len(given):
        raise UserError(f"gains names one twice: {', '.join(given)}. Name each once.")
    return tuple(given)


def _require_positive(key: str, given: int | Mapping[str, int] | None, expected: str) -> None:
    for value in given.values() if isinstance(given, Mapping) else [given]:
        if value is not None and value < 1:
            raise UserError(f"{key} is {value}; {expected}.")


def _require(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{key} is '{value}'; expected {' or '.join(known)}.{nearest(str(value), known)}")


def one_of(given: int | Mapping[str, int], linear: str, key: str) -> int:
    """Return the number that a setting has for a linear.

    Raises:
        UserError: when a mapping has none for it, or several.
    """
    if isinstance(given, int):
        return given
    found = [value for target, value in given.items() if names(linear, target)]
    if len(found) != 1:
        raise UserError(
            f"{key} has {len(found)} entries for the linear '{linear}': {', '.join(given) or 'it is empty'}. "
            "Expected one for each linear that is shared, or one number for all."
        )
    return found[0]


def names(linear: str, target: str) -> bool:
    """Tell whether a target means this linear: its whole name inside the layer, or the last parts of it."""
    return linear == target or linear.endswith(f".{target}")
