"""A supernet: every slot of a layer holds all modes that it may have, and a path says which of them are computed.

Ranks share weights: rank 4 is the first 4 columns of rank 8. In plain scaling it has the same scale, so a smaller rank
is a truncation; in even scaling each rank has its own, alpha / rank, as where it is trained alone (`slot_choices`).
What a path leaves out is not computed, and gets a gradient of zero: every parameter has a gradient in every step on
every rank, in the same order, whatever was drawn. ZeRO's buckets of 1, 2 and 3 stay sound by that.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from glora_llm.errors import UserError, nearest
from glora_llm.glora.modes import Choices, make_slot
from glora_llm.glora.path import PEFT_ROOT, Genome, LayerPath, SlotSpec
from glora_llm.schema.slots import RANKED_MODES, SLOT_MODES, SLOTS, SUPERNET_MODES

SlotChoices = dict[str, tuple[SlotSpec, ...]]  # slot -> what it may be, the largest first


class SearchedLayer(Protocol):
    """A layer of a supernet as the sampler and the search see it: one of GLoRA's, or a block of NOAH's.

    Attributes:
        choices: adapter -> what each of its slots may be.
        path: adapter -> what is computed.
        composition: adapter -> of A in mode lora; empty where there is no such slot.
    """

    choices: dict[str, SlotChoices]
    path: dict[str, LayerPath]
    composition: dict[str, str]

    @property
    def out_features(self) -> int:
        """O."""
        ...

    @property
    def in_features(self) -> int:
        """I."""
        ...

    @property
    def b0(self) -> Tensor | None:
        """The frozen bias, without which there is no slot D."""
        ...

    def slot_numel(self, slot: str, spec: SlotSpec) -> int:
        """Return the trainable parameters of a slot."""
        ...


MODE_OF = {
    "down": "lora",
    "up": "lora",
    "block_down": "block",
    "block_up": "block",
}  # parameter -> mode; the others are named after their mode


def slot_choices(
    modes: Mapping[Any, Sequence[str]] | None, ranks: Sequence[int], alpha: float, even: bool = False
) -> SlotChoices:
    """Return what each slot may be; modes lora and block once for each rank, all at the scale alpha / largest rank.

    Args:
        modes: slot -> modes allowed; a slot that is not given may be anything of `SUPERNET_MODES`.
        ranks: of modes lora and block.
        even: each rank r has the scale alpha / r instead. A step moves r columns by the rate each; columns that move
            together move the output by scale x r, alike for all ranks then. At one scale rank 2 of 8 would move it by
            a quarter, and a genome of rank 2 would train on at a quarter of the rate. DyLoRA (arXiv 2210.07558)
            scales its truncations so too.

    Raises:
        UserError: for an unknown slot or mode, or a slot without any.
    """
    given = dict(modes or {})
    unknown = sorted(set(given) - set(SLOT_MODES))
    if unknown:
        raise UserError(f"Unknown GLoRA slot '{unknown[0]}'; there are A, B, C, D and E.")
    found: SlotChoices = {}
    for slot in SLOTS:
        allowed = given.get(slot, SUPERNET_MODES[slot])
        wrong = [mode for mode in allowed if mode not in SLOT_MODES[slot]]
        if wrong or not allowed:
            known = ", ".join(SLOT_MODES[slot])
            what = f"no mode '{wrong[0]}'" if wrong else "no mode left"
            hint = nearest(wrong[0], SLOT_MODES[slot]) if wrong else ""
            raise UserError(f"Slot {slot} has {what}; it has: {known}.{hint}")
        sizes = sorted(set(ranks), reverse=True)
        found[slot] = tuple(
            spec
            for mode in SLOT_MODES[slot]
            if mode in allowed
            for spec in (
                [SlotSpec(mode, rank, alpha / (rank if even else sizes[0])) for rank in sizes]
                if mode in RANKED_MODES
                else [SlotSpec(mode)]
            )
        )
    return found


def slots_of(choices: SlotChoices, has_bias: bool) -> tuple[str, ...]:
    """Return the slots of a layer that has these choices: D scales the frozen bias, so it needs one."""
    return tuple(slot for slot in choices if slot != "D" or has_bias)


def largest_path(choices: SlotChoices, has_bias: bool) -> LayerPath:
    """Return the path with the first choice of every slot; slot D is none where there is no bias."""
    specs = [(slot, choices[slot][0]) for slot in slots_of(choices, has_bias)]
    return LayerPath(tuple((slot, spec) for slot, spec in specs if spec.mode != "none"))


def smallest_path(choices: SlotChoices, has_bias: bool) -> LayerPath:
    """Return the path with the last choice of every slot that is not none: every slot acts, as small as it can be."""
    acting = {slot: [spec for spec in choices[slot] if spec.mode != "none"] for slot in slots_of(choices, has_bias)}
    return LayerPath(tuple((slot, specs[-1]) for slot, specs in acting.items() if specs))


def make_choices(
    slot: str, specs: Sequence[SlotSpec], composition: str, out_features: int, in_features: int, generator: Any
) -> Choices:
    """Return the parameters of all modes of one slot; modes with a rank at their largest."""
    first: dict[str, SlotSpec] = {}
    for spec in specs:
        if spec.mode != "none":
            first.setdefault(spec.mode, spec)
    return Choices(make_slot(slot, spec, composition, out_features, in_features, generator) for spec in first.values())


def set_paths(layers: Mapping[str, SearchedLayer], genome: Genome) -> None:
    """Let every layer of a supernet compute its path of a genome."""
    for name, layer in layers.items():
        layer.path["default"] = genome[name]


def gate(x: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Pass x and all parameters of a layer through one node of the graph; return x and how to read a parameter."""
    passed_x, *passed = _Gate.apply(x, *parameters)
    values = {id(parameter): value for parameter, value in zip(parameters, passed, strict=True)}
    return passed_x, lambda parameter: values[id(parameter)]


class _Gate(torch.autograd.Function):
    """The identity. Autograd hands its backward zeros for outputs that were not used."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def inherit(weights: Mapping[str, Tensor], genome: Genome) -> dict[str, Tensor]:
    """Return the weights of one genome's plain adapter out of a supernet's.

    Args:
        weights: as PEFT saves them: `...LAYER.slot_A.down` and so on; others are kept as they are.

    Raises:
        UserError: when the genome names a layer, a mode or a rank that the supernet does not have.
    """
    require_known(genome, sorted({_layer_of(name) for name in weights if ".slot_" in name}))
    kept = {name: tensor for name, tensor in weights.items() if ".slot_" not in name}
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if ".slot_" not in name:
            continue
        layer, (slot, part) = _layer_of(name), name.split(".slot_")[1].split(".")
        spec = genome.get(layer, LayerPath(()))[slot]
        if spec.mode == MODE_OF.get(part, part):
            found[name] = _first_ranks(tensor, spec, part, f"slot {slot} of {layer}")
    _require_all(genome, found)
    return kept | found


def _first_ranks(tensor: Tensor, spec: SlotSpec, part: str, where: str) -> Tensor:
    if spec.mode not in RANKED_MODES:
        return tensor
    dimension = 1 if part.endswith("down") else 0
    if spec.rank > tensor.shape[dimension]:
        raise UserError(f"genome: {where} has rank {spec.rank}; the supernet has up to {tensor.shape[dimension]}.")
    return tensor.narrow(dimension, 0, spec.rank).contiguous()


def _layer_of(name: str) -> str:
    return name.split(".slot_", maxsplit=1)[0].removeprefix(PEFT_ROOT)


def require_known(genome: Genome, layers: Sequence[str]) -> None:
    """Check that a genome names layers that are there.

    Raises:
        UserError: with the nearest name.
    """
    for name in genome:
        if name not in layers:
            raise UserError(
                f"genome: there is no adapted layer '{name}' among the {len(layers)} of this model, such as "
                f"{layers[0] if layers else 'none'}.{nearest(name, layers)}"
            )


def _require_all(genome: Genome, found: Mapping[str, Tensor]) -> None:
    there = {(_layer_of(name), name.split(".slot_")[1][0]) for name in found}
    for layer, path in genome.items():
        for slot, spec in path.active():
            if (layer, slot) not in there:
                raise UserError(
                    f"genome: slot {slot} of {layer} is to be {spec.mode}, and the supernet has no such mode there."
                )
