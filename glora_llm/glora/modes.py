"""The parameterisations of a slot, one class a mode. Each is zero at the start: the model's output is unchanged.

Letters: O out_features, I in_features, r rank.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from glora_llm.errors import UserError
from glora_llm.glora.path import SlotSpec
from glora_llm.schema.slots import BLOCK

Read = Callable[[Tensor], Tensor]  # a parameter -> what stands for it in the graph


class Lora(nn.Module):
    """A slot as a product of two thin factors, `scale * down @ up`; down (rows, r) is zero, up (r, columns) Kaiming.

    Args:
        rows: rows of the product.
        columns: columns of the product.
        spec: its rank.
        generator: draws `up`; the default generator if None.
    """

    def __init__(self, rows: int, columns: int, spec: SlotSpec, generator: torch.Generator | None = None):
        super().__init__()
        self.down = nn.Parameter(torch.zeros(rows, spec.rank))
        self.up = nn.Parameter(torch.empty(spec.rank, columns))
        if self.up.device.type != "meta":
            nn.init.kaiming_uniform_(self.up, a=math.sqrt(5), generator=generator)


class Block(nn.Module):
    """Gains of A, `scale * block_down @ block_up`, (O, I/64): one for each block of 64 values along a row of W0.

    The blocks are those that share a scale in a 4-bit weight, so the gains change its scales and none of its codes.
    block_down (O, r) is zero, block_up (r, I/64) Kaiming.

    Args:
        out_features: O.
        in_features: I.
        spec: its rank.
        generator: draws `block_up`; the default generator if None.

    Raises:
        UserError: where 64 does not divide I, or the rank is above I/64.
    """

    def __init__(self, out_features: int, in_features: int, spec: SlotSpec, generator: torch.Generator | None = None):
        super().__init__()
        blocks = blocks_of(in_features)
        if spec.rank > blocks:
            count = f"{blocks} block{'s' if blocks > 1 else ''} of {BLOCK}"
            raise UserError(
                f"Slot A in mode block has rank {spec.rank}, and a row of {in_features} inputs has {count}, so a rank "
                f"above {blocks} adds nothing. Set adapter.rank={blocks} or less, or give this layer a rank of its own "
                "by adapter.paths."
            )
        self.block_down = nn.Parameter(torch.zeros(out_features, spec.rank))
        self.block_up = nn.Parameter(torch.empty(spec.rank, blocks))
        if self.block_up.device.type != "meta":
            nn.init.kaiming_uniform_(self.block_up, a=math.sqrt(5), generator=generator)


def blocks_of(in_features: int) -> int:
    """Return I/64, the number of blocks in a row.

    Raises:
        UserError: where 64 does not divide I.
    """
    if in_features % BLOCK:
        raise UserError(
            f"Slot A in mode block has one gain for each {BLOCK} inputs of a layer, and this one has {in_features}, "
            f"which {BLOCK} does not divide. Give this layer another mode by adapter.paths (vector is lossless in 4 "
            "bits too), or leave it out of the targets."
        )
    return in_features // BLOCK


class Vector(nn.Module):
    """A slot as one vector of `size` elements, zero at the start."""

    def __init__(self, size: int):
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(size))


class Scalar(nn.Module):
    """A slot as one number, shape (1,), zero at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.zeros(1))


class Choices(nn.Module):
    """All modes that a slot of a supernet may have, under the names that each has alone."""

    def __init__(self, modes: Iterable[nn.Module]):
        super().__init__()
        for module in modes:
            for name, parameter in module.named_parameters():
                self.register_parameter(name, parameter)


def make_slot(
    slot: str,
    spec: SlotSpec,
    composition: str,
    out_features: int,
    in_features: int,
    generator: torch.Generator | None = None,
) -> Lora | Block | Vector | Scalar:
    """Return the parameters of one slot of a linear of shape (O, I).

    Shapes in mode lora: A (I, r)(r, I) as a product, (O, r)(r, I) as hadamard; B (O, r)(r, I); C (I, r)(r, 1).
    In mode block: A (O, r)(r, I/64). In mode vector: A, B, D, E (O); C (I).
    """
    if spec.mode == "lora":
        rows = in_features if slot == "C" or (slot == "A" and composition == "product") else out_features
        return Lora(rows, 1 if slot == "C" else in_features, spec, generator)
    if spec.mode == "block":
        return Block(out_features, in_features, spec, generator)
    if spec.mode == "vector":
        return Vector(in_features if slot == "C" else out_features)
    return Scalar()


def slot_values(slot: str, spec: SlotSpec, owner: Any, read: Read, factor: float = 1.0) -> dict[str, Any]:
    """Return the fields of `linear.Slots` that a slot fills.

    Args:
        owner: the slot's parameters: of one mode, or of all; only those of the spec's mode are read.
        read: what stands for a parameter in the graph.
        factor: multiplies the slot, beside the scale of its rank.
    """
    key, scale = slot.lower(), spec.scale * factor
    if spec.mode == "block":
        down, blocks = read(owner.block_down), read(owner.block_up)
        if down.shape[1] != spec.rank:
            down, blocks = down[:, : spec.rank].contiguous(), blocks[: spec.rank]
        return {"a_down": down, "a_blocks": blocks, "a_scale": scale}
    if spec.mode != "lora":
        value = read(getattr(owner, spec.mode))
        return {{"A": "a_gain", "B": "b_shift"}.get(slot, key): value if factor == 1 else factor * value}
    down, up = read(owner.down), read(owner.up)
    if down.shape[1] != spec.rank:  # ranks share columns
        down, up = down[:, : spec.rank].contiguous(), up[: spec.rank]
    if slot == "C":
        return {key: (scale * (down @ up)).reshape(-1)}
    return {f"{key}_down": down, f"{key}_up": up, f"{key}_scale": scale}


def slot_numel(slot: str, spec: SlotSpec, composition: str, out_features: int, in_features: int) -> int:
    """Return the number of elements that `make_slot` allocates; 0 for mode none."""
    if spec.mode == "none":
        return 0
    with torch.device("meta"):
        made = make_slot(slot, spec, composition, out_features, in_features)
    return sum(parameter.numel() for parameter in made.parameters())
