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
        increments: (L - L / k) r (O + I).
        biases: one of O in every layer, or none.
    """

    dense: int = 0
    base: int = 0
    increments: int = 0
    biases: int = 0

    @property
    def total(self) -> int:
        """The allocated parameters."""
        return self.base + self.increments + self.biases

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
        )


def matrix_count(out_features: int, in_features: int, layers: int, size: int, rank: int, bias: bool = False) -> Count:
    """Return (L / k) O I + (L - L / k) r (O + I), and biases: one matrix over L layers in compounds of k = `size`."""
    compounds = layers // size
    full, biases = out_features * in_features, layers * out_features * bias
    increments = (layers - compounds) * rank * (out_features + in_features)
    return Count(layers * full + biases, compounds * full, increments, biases)


def allocated(model: nn.Module) -> Count:
    """Return what the shared linears of a model hold, and would hold in the dense model of the same shape."""
    total = Count()
    bases: dict[int, nn.Linear] = {}
    for layer in vlora_layers(model).values():
        base = layer.parts()[0]
        factors = layer.increment_b.numel() + layer.increment_a.numel()
        biases = 0 if layer.bias is None else layer.out_features
        full = layer.out_features * layer.in_features
        if id(base) not in bases:  # the first layer's own linear
            bases[id(base)] = layer
            total += Count(full + biases, full, 0, biases)
        total += Count(full + biases, 0, factors, biases)
    return total


def parameter_count(model: nn.Module, layers: Sequence[nn.Module], config: VLoRAConfig) -> dict[str, Count]:
    """Return linear -> what `make_compounds` with the same arguments will allocate; `sum(.., Count())` is the whole.

    Raises:
        UserError: as `make_compounds`.
    """
    layout = lay_out_compounds(model, layers, config)
    counts: dict[str, Count] = {}
    for name, linears in layout.compounds():
        shape = linears[0].out_features, linears[0].in_features
        counts[name] = matrix_count(
            *shape, len(layout.layers), layout.size, layout.ranks[name], linears[0].bias is not None
        )
    return counts
