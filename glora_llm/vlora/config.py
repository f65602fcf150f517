"""The shape of a VLoRA model: shared linears, layers per base, rank, and the two published forms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glora_llm.errors import UserError, nearest
from glora_llm.schema.vlora import VLORA_CHOICES


@dataclass(frozen=True)
class VLoRAConfig:
    """The shape of a VLoRA model. The defaults are the paper's (arXiv 2406.09315).

    The released package (vlora 0.1) is `topology="star", base_gradient="first", start="kaiming"`.

    Args:
        targets: names of the linears inside a layer, whole or by their last parts (`q_proj`); None: all of them.
        layers_per_compound: k, layers that share one base; None: the whole model is one compound.
        rank: r, one for all or target -> r.
        alpha: an increment is scaled by s = alpha / r; None: s = 1.
        topology: what a layer's increment is added to: `chain` the previous layer's weight, `star` the base.
        base_gradient: where the base's gradient comes from: `all` layers of its compound, or its `first` layer alone.
        start: `paper`: B = 0 and A Kaiming, so all layers of a compound start equal; `kaiming`: both Kaiming.
        form: how a layer is computed: `composed`, `thin`, or `auto`, the cheaper one for each input.

    Raises:
        UserError: for a word that is none of these, or a number below 1.
    """

    targets: Sequence[str] | None = None
    layers_per_compound: int | None = 4
    rank: int | Mapping[str, int] = 8
    alpha: float | None = None
    topology: str = "chain"
    base_gradient: str = "all"
    start: str = "paper"
    form: str = "auto"

    def __post_init__(self) -> None:
        for key, known in VLORA_CHOICES.items():
            value = getattr(self, key)
            if value not in known:
                raise UserError(f"{key} is '{value}'; expected {' or '.join(known)}.{nearest(str(value), known)}")
        if self.layers_per_compound is not None and self.layers_per_compound < 1:
            raise UserError(f"layers_per_compound is {self.layers_per_compound}; expected 1 or more, or None for all.")
        if self.alpha is not None and not self.alpha > 0:
            raise UserError(f"alpha is {self.alpha}; expected a number above 0, or None for a scaling of 1.")
        if isinstance(self.targets, str):
            raise UserError(f"targets is the text '{self.targets}'; expected a list of names: ['{self.targets}'].")
        for rank in self.rank.values() if isinstance(self.rank, Mapping) else [self.rank]:
            if rank < 1:
                raise UserError(f"rank is {rank}; expected 1 or more.")

    def compound_size(self, layers: int) -> int:
        """Return k for a model of so many layers.

        Raises:
            UserError: when k does not divide them; the message names the sizes that do.
        """
        size = self.layers_per_compound or layers
        if layers % size:
            fits = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
            raise UserError(
                f"layers_per_compound is {size}, which does not divide {layers} layers. Sizes that fit: {fits}."
            )
        return size

    def scale(self, rank: int) -> float:
        """Return s, the factor of an increment of this rank."""
        return 1.0 if self.alpha is None else self.alpha / rank


def names(linear: str, target: str) -> bool:
    """Tell whether a target means this linear: its whole name inside the layer, or the last parts of it."""
    return linear == target or linear.endswith(f".{target}")
