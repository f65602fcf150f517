"""Count the parameters of a VLoRA model before it is made."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from glora_llm.vlora.compound import lay_out_compounds
from glora_llm.vlora.config import VLoRAConfig
from glora_llm.vlora.layer import vlora_layers


@dataclass(frozen=True)
class Count:
    """Parameters of some shared linears over all layers, biases included.

    Args:
        dense: before: L O I and the biases.
        base: full-rank weights that remain, (L / k) O I.
        increments: (L - L / k) r (O + I); L r (O + I) where all layers of a compound add one.
        biases: one of O in every layer, or none.
        gains: (L - L / k) (or L) times O for rows, I for columns, min(O, I) for a diagonal.
    """

    dense: int = 0
    base: int = 0
    increments: int = 0
    biases: int = 0
    gains: int = 0

    @property
    def total(self) -> int:
        """The allocated parameters."""
        return self.base + self.increments + self.biases + self.gains

    @property
    def share(self) -> float:
        """The total as a share of the dense linears' parameters."""
        return self.total / self.dense

    def __add__(self, other: "Count") -> "Count":
        return Count(
            self.dense + other.dense,
            self.base + other.base,
            self.increments + other.increments,
            self.biases + other.biases,
            self.gains + other.gains,
        )


def matrix_count(
    out_features: int,
    in_features: int,
    layers: int,
    size: int,
    rank: int,
    bias: bool = False,
    gains: Sequence[str] = (),
    all_add: bool = False,
) -> Count:
    """Return (L / k) O I + (L - L / k) r (O + I), biases, gains: a matrix over L layers, k = `size` a compound.

    Args:
        gains: of `row`, `column` and `diagonal`, beside each increment.
        all_add: all layers of a compound add an increment, also the first.
    """
    compounds = layers // size
    full, biases = out_features * in_features, layers * out_features * bias
    adding = layers if all_add else layers - compounds
    lengths = {"row": out_features, "column": in_features, "diagonal": min(out_features, in_features)}
    return Count(
        dense=layers * full + biases,
        base=compounds * full,
        increments=adding * rank * (out_features + in_features),
        biases=biases,
        gains=adding * sum(lengths[gain] for gain in gains),
    )


def allocated(model: nn.Module) -> Count:
    """Return what the shared linears of a model hold, and would hold in the dense model of the same shape."""
    total = Count()
    bases: dict[int, nn.Module] = {}
    for layer in vlora_layers(model).values():
        base = layer.base_owner
        factors = layer.increment_b.numel() + layer.increment_a.numel()
        gains = sum(factor.numel() for factor in layer.factors()) - factors
        biases = 0 if layer.bias is None else layer.out_features
        full = layer.out_features * layer.in_features
        if id(base) not in bases:
            bases[id(base)] = base
            # The first layer's own linear; where all layers add, the base is beside the layers' linears.
            total += Count(full + biases, full, 0, biases) if isinstance(base, nn.Linear) else Count(base=full)
        total += Count(full + biases, 0, factors, biases, gains)
    return total


def parameter_count(model: nn.Module, layers: Sequence[nn.Module], config: VLoRAConfig) -> dict[str, Count]:
    """Return linear -> what `make_compounds` with the same arguments will allocate; `sum(.., Count())` is the whole.

    Raises:
        UserError: as `make_compounds`.
    """
    layout = lay_out_compounds(model, layers, config)
    counts: dict[str, Count] = {}
    for shared in layout.compounds():
        linear, name = shared.linears[0], shared.name
        counts[name] = matrix_count(
            linear.out_features,
            linear.in_features,
            len(layout.layers),
            len(shared.linears),
            layout.ranks[name],
            linear.bias is not None,
            config.gains_of(name),
            config.increments == "all",
        )
    return counts
