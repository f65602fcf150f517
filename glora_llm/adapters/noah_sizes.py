"""The sizes of NOAH's modules in each block (`noah`): configuration, parameters, and what a smaller size inherits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft.utils import PeftType
from torch import Tensor, nn

from glora_llm.adapters.bottleneck import activation_of
from glora_llm.adapters.module_config import ModuleConfig, require_dropout
from glora_llm.errors import AdapterError, UserError
from glora_llm.glora.config import add_peft_type
from glora_llm.glora.path import (
    PEFT_ROOT,
    Genome,
    LayerPath,
    SlotSpec,
    genome_from_json,
    genome_from_slots,
    is_sized,
    sized_path,
)
from glora_llm.glora.supernet import SlotChoices, require_known
from glora_llm.schema import AdapterSection
from glora_llm.schema.slots import NOAH_SIZES, SIZED_PARTS, SIZED_SLOTS


@dataclass
class NoahConfig(ModuleConfig):
    """Configuration of NOAH; its places are all blocks.

    Args:
        rank: size of the adapter, of LoRA and of the prompts of every block, where nothing else is said.
        adapter: h of every block; None: `rank`.
        lora: r of every block; None: `rank`.
        prompt: P of every block; None: `rank`.
        genome: block -> its three sizes, instead of the same for all; a block that is not named has none.
        supernet: {sizes: slot -> sizes}: allocate the largest, sizes are drawn at every micro step.
        scale: s.
        activation: f, by its name in transformers.
        dropout: of the hidden units of the adapter.
        patch_size: S of the prompts' start; None: that of the model.
    """

    own_type: ClassVar[PeftType] = add_peft_type("NOAH")
    rank: int = field(default=8)
    adapter: int | None = field(default=None)
    lora: int | None = field(default=None)
    prompt: int | None = field(default=None)
    genome: dict[str, dict[str, int]] | None = field(default=None)
    supernet: dict[str, Any] | None = field(default=None)
    scale: float = field(default=1.0)
    activation: str = field(default="quick_gelu")
    dropout: float = field(default=0.0)
    patch_size: int | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, size in self.sizes.items():
            if type(size) is not int or size < 0:
                raise AdapterError(f"adapter.peft.{name} is {size}; expected its size, a whole number from 0.")
        if not self.scale:
            raise AdapterError("scale is 0, and LoRA would not be trained: its size 0 leaves it out.")
        require_dropout(self.dropout)
        activation_of(self.activation)
        try:
            self._genome = None if self.genome is None else genome_from_slots(self.genome)
        except UserError as error:
            raise AdapterError(str(error)) from None
        if self._genome and not is_sized(self._genome) and any(True for p in self._genome.values() for _ in p.active()):
            raise AdapterError(
                "the genome has GLoRA's slots; one of noah gives blocks their sizes, such as "
                '{"vit.layers.0": {"adapter": 10, "lora": 5, "prompt": 50}}.'
            )

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of every block, where no genome or supernet says others."""
        given = {"adapter": self.adapter, "lora": self.lora, "prompt": self.prompt}
        return {slot: self.rank if size is None else size for slot, size in given.items()}

    @property
    def choices(self) -> SlotChoices | None:
        """The choices of each slot in a supernet, the largest first; None where the sizes are fixed."""
        return None if self.supernet is None else size_choices(self.supernet.get("sizes"))

    def path_of(self, name: str) -> LayerPath:
        """Return the path of the block `name`."""
        return sized_path(self.sizes) if self._genome is None else self._genome.get(name, LayerPath(()))


def size_choices(sizes: Mapping[Any, list[int]] | None) -> SlotChoices:
    """Return what each slot may be.

    Args:
        sizes: by slot, 0 for none; one that is not given may be any of `NOAH_SIZES`.
    """
    found: SlotChoices = {}
    for slot, mode in SIZED_SLOTS.items():
        allowed = sorted(set((sizes or {}).get(slot, NOAH_SIZES)), reverse=True)
        found[slot] = tuple(SlotSpec(mode, size) if size else SlotSpec("none") for size in allowed)
    return found


class NoahParts(nn.Module):
    """The parameters of one adapter in one block; what has size 0 has none.

    Args:
        sizes: of the three slots.
        linears: (O, I) of the linears with LoRA.
        hidden: H.
        bound: prompts begin uniform in +-bound.
    """

    def __init__(self, sizes: Mapping[str, int], linears: Mapping[str, tuple[int, int]], hidden: int, bound: float):
        super().__init__()
        units, rank, prompts = (sizes.get(slot, 0) for slot in SIZED_SLOTS)
        for name, (outputs, inputs) in (linears if rank else {}).items():
            setattr(self, f"{name}_down", nn.Parameter(_draw(rank, inputs)))
            setattr(self, f"{name}_up", nn.Parameter(torch.zeros(outputs, rank)))
        if units:
            self.down, self.down_bias = nn.Parameter(_draw(units, hidden)), nn.Parameter(torch.zeros(units))
            self.up, self.up_bias = nn.Parameter(torch.zeros(hidden, units)), nn.Parameter(torch.zeros(hidden))
        if prompts:
            self.prompt = nn.Parameter(torch.empty(prompts, hidden).uniform_(-bound, bound))

    def first(self, name: str, size: int, like: Tensor) -> Tensor:
        """Return the part of a parameter that a size uses, in the dtype of `like`."""
        side = next(sides[name] for sides in SIZED_PARTS.values() if name in sides)
        value: Tensor = getattr(self, name)
        whole = side is None or value.shape[side] == size
        return (value if whole else value.narrow(side or 0, 0, size)).to(like.dtype)

    def all(self) -> list[Tensor]:
        """Return every parameter, each read as an attribute: under ZeRO 3 that gathers a partitioned one."""
        return [getattr(self, name) for name in self._parameters]


def _draw(outputs: int, inputs: int) -> Tensor:
    """Return a new matrix (O, I), uniform in +-1 / sqrt(I), as LoRA's A begins."""
    return nn.init.kaiming_uniform_(torch.empty(outputs, inputs), a=math.sqrt(5))


def inherit(weights: Mapping[str, Tensor], genome: Genome) -> dict[str, Tensor]:
    """Return the weights of one genome's plain adapter out of a supernet's.

    Args:
        weights: as PEFT saves them: `...BLOCK.noah_parts.down` and so on; others are kept as they are.

    Raises:
        UserError: when the genome names a block or a size that the supernet does not have.
    """
    marked = ".noah_parts."
    blocks = {name: name.partition(marked)[0].removeprefix(PEFT_ROOT) for name in weights if marked in name}
    require_known(genome, sorted(set(blocks.values())))
    found = {name: tensor for name, tensor in weights.items() if name not in blocks}
    missing = {(block, slot) for block, path in genome.items() for slot, _ in path.active()}
    for name, block in blocks.items():
        part = name.rpartition(".")[2]
        slot = next(slot for slot, sides in SIZED_PARTS.items() if part in sides)
        size, side = genome.get(block, LayerPath(()))[slot].rank, SIZED_PARTS[slot][part]
        missing.discard((block, slot))
        if size and side is None:
            found[name] = weights[name]
        elif size and side is not None:
            most = weights[name].shape[side]
            if size > most:
                raise UserError(f"genome: {slot} of {block} has size {size}; the supernet has up to {most}.")
            found[name] = weights[name].narrow(side, 0, size).contiguous()
    for block, slot in sorted(missing):
        raise UserError(f"genome: {block} is to have {slot}, and the supernet has none there.")
    return found


def is_lora_alone(section: AdapterSection) -> bool:
    """Tell whether no block of a recipe's structure has an adapter or prompts, nor may have them in a supernet."""
    if section.genome is not None:
        paths = genome_from_json(Path(section.genome).read_text(encoding="utf-8"))
        return all(slot == "lora" for path in paths.values() for slot, _ in path.active())
    sizes: Mapping[Any, list[int]] = (section.supernet.sizes if section.supernet else None) or {}
    fixed = {"adapter": section.rank, "prompt": section.rank} | (section.peft or {})
    others = ("adapter", "prompt")
    return all(sizes.get(slot, NOAH_SIZES) == [0] if section.is_supernet else fixed[slot] == 0 for slot in others)
