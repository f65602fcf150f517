"""How a slot is parameterised: one class a mode. Every mode is zero at the start, so the model's output is unchanged.

Letters: O out_features, I in_features, r rank.
"""

import math

import torch
from torch import Tensor, nn

from glora_llm.glora.path import SlotSpec


class Lora(nn.Module):
    """A slot as a product of two thin factors, `scale * down @ up`; down (rows, r) is zero, up (r, columns) Kaiming.

    Args:
        rows: rows of the product.
        columns: columns of the product.
        spec: rank and scale.
        generator: draws `up`; the default generator if None.
    """

    def __init__(self, rows: int, columns: int, spec: SlotSpec, generator: torch.Generator | None = None):
        super().__init__()
        self.scale = spec.scale
        self.down = nn.Parameter(torch.zeros(rows, spec.rank))
        self.up = nn.Parameter(torch.empty(spec.rank, columns))
        if self.up.device.type != "meta":
            nn.init.kaiming_uniform_(self.up, a=math.sqrt(5), generator=generator)

    def value(self) -> Tensor:
        """Return the slot as one (rows, columns) matrix."""
        return self.scale * (self.down @ self.up)


class Vector(nn.Module):
    """A slot as one vector of `size` elements, zero at the start."""

    def __init__(self, size: int):
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(size))

    def value(self) -> Tensor:
        """Return the vector, (size,)."""
        return self.vector


class Scalar(nn.Module):
    """A slot as one number, shape (1,), zero at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.zeros(1))

    def value(self) -> Tensor:
        """Return the number, (1,)."""
        return self.scalar


def make_slot(
    slot: str,
    spec: SlotSpec,
    composition: str,
    out_features: int,
    in_features: int,
    generator: torch.Generator | None = None,
) -> Lora | Vector | Scalar:
    """Return the parameters of one slot of a linear of shape (O, I).

    Shapes in mode lora: A (I, r)(r, I) as a product, (O, r)(r, I) as hadamard; B (O, r)(r, I); C (I, r)(r, 1).
    In mode vector: A, B, D, E (O); C (I).
    """
    if spec.mode == "lora":
        rows = in_features if slot == "C" or (slot == "A" and composition == "product") else out_features
        return Lora(rows, 1 if slot == "C" else in_features, spec, generator)
    if spec.mode == "vector":
        return Vector(in_features if slot == "C" else out_features)
    return Scalar()
