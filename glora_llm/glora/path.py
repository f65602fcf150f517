"""Slots, modes and paths: which mode each slot of each layer has. Words as in the GLoRA paper (arXiv 2306.07967).

*slot*: one of A B C D E. *mode*: how a slot is parameterised. *path*: one mode (and rank) for each slot of one
layer. *genome*: layer name -> path, for the whole model. NOAH's genomes are of the same form: their layers are blocks,
their slots adapter, lora and prompt, each with a size.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from glora_llm.errors import UserError, nearest
from glora_llm.files.json_file import parse
from glora_llm.schema.slots import LOSSLESS_MODES, RANKED_MODES, SIZED_SLOTS, SLOT_MODES, SLOTS

PEFT_ROOT = "base_model.model."  # what PEFT puts before the base model's names


def slots_with(has_bias: bool) -> tuple[str, ...]:
    """Return the slots that a layer can have: D scales the frozen bias, so it needs one."""
    return tuple(slot for slot in SLOTS if slot != "D" or has_bias)


@dataclasses.dataclass(frozen=True)
class SlotSpec:
    """One slot of one layer.

    Args:
        mode: an entry of `SLOT_MODES[slot]`.
        rank: r of modes lora and block (ignored by the others).
        scale: factor on the slot in these modes: alpha / r, or alpha / sqrt(r) with rank stabilisation.
    """

    mode: str
    rank: int = 0
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class LayerPath:
    """One mode for each slot of one layer; a slot that is not given has mode none."""

    slots: tuple[tuple[str, SlotSpec], ...]

    def __getitem__(self, slot: str) -> SlotSpec:
        return dict(self.slots).get(slot, SlotSpec("none"))

    def active(self) -> Iterator[tuple[str, SlotSpec]]:
        """Yield (slot, spec) of all slots whose mode is not none."""
        return ((slot, spec) for slot, spec in self.slots if spec.mode != "none")

    def without(self, slot: str) -> "LayerPath":
        """Return the path with `slot` in mode none."""
        return LayerPath(tuple(pair for pair in self.slots if pair[0] != slot))

    def touches_bias(self) -> bool:
        """Tell whether the merged layer needs a bias: C or E is active."""
        return self["C"].mode != "none" or self["E"].mode != "none"

    def lossy_slots(self) -> list[str]:
        """Return the slots that change more of a 4-bit weight than the scales of its blocks."""
        return [slot for slot, spec in self.active() if spec.mode not in LOSSLESS_MODES[slot]]


Genome = dict[str, LayerPath]


def make_path(slots: Mapping[str, Any], rank: int, alpha: float, rank_stabilized: bool = False) -> LayerPath:
    """Build a path from a recipe's or a config's slots.

    Args:
        slots: slot -> mode, or slot -> {mode, rank, alpha}.
        rank: r where a slot names none.
        alpha: where a slot names none; the scale is alpha / r (or alpha / sqrt(r) if `rank_stabilized`).

    Raises:
        UserError: for an unknown slot, or a mode that the slot does not have.
    """
    unknown = [slot for slot in slots if slot not in SLOT_MODES]
    if unknown:
        raise UserError(f"Unknown GLoRA slot '{unknown[0]}'; there are A, B, C, D and E.")
    specs = []
    for slot in SLOTS:
        given = slots.get(slot, "none")
        given = {"mode": given} if isinstance(given, str) else dict(given)
        mode = given["mode"]
        if mode not in SLOT_MODES[slot]:
            known = ", ".join(SLOT_MODES[slot])
            raise UserError(f"Slot {slot} has no mode '{mode}'; it has: {known}.{nearest(mode, SLOT_MODES[slot])}")
        if mode in RANKED_MODES:
            slot_rank, slot_alpha = given.get("rank") or rank, given.get("alpha") or alpha
            scale = slot_alpha / (slot_rank**0.5 if rank_stabilized else slot_rank)
            specs.append((slot, SlotSpec(mode, slot_rank, scale)))
        elif mode != "none":
            specs.append((slot, SlotSpec(mode)))
    return LayerPath(tuple(specs))


def path_for(name: str, default: LayerPath, patterns: Mapping[str, LayerPath]) -> LayerPath:
    """Return the path of the layer `name`: of the last regular expression that matches, else `default`."""
    chosen = default
    for pattern, path in patterns.items():
        if re.search(pattern, name):
            chosen = path
    return chosen


def genome_to_slots(genome: Genome) -> dict[str, dict[str, Any]]:
    """Return a genome as plain values: layer name -> slot -> mode, or {mode, rank, scale} of modes lora and block.

    NOAH's slots have their size.
    """
    return {name: {slot: _slot_value(slot, spec) for slot, spec in path.active()} for name, path in genome.items()}


def _slot_value(slot: str, spec: SlotSpec) -> Any:
    if slot in SIZED_SLOTS:
        return spec.rank
    return dataclasses.asdict(spec) if spec.mode in RANKED_MODES else spec.mode


def genome_to_json(genome: Genome) -> str:
    """Return a genome as JSON, a layer a line, readable and editable by hand."""
    lines = [f"  {json.dumps(name)}: {json.dumps(slots)}" for name, slots in genome_to_slots(genome).items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def genome_from_json(text: str) -> Genome:
    """Read what `genome_to_json` wrote.

    Raises:
        UserError: when it is no JSON object of layers, or for an unknown slot or mode.
    """
    layers = parse(text, "genome", "A search writes RUN/genome.json.")
    if not isinstance(layers, dict) or not all(isinstance(slots, dict) for slots in layers.values()):
        raise UserError('genome: expected an object such as {"model.layers.0.mlp.up_proj": {"B": "vector"}}.')
    return genome_from_slots(layers)


def genome_from_slots(layers: Mapping[str, Mapping[str, Any]]) -> Genome:
    """Read what `genome_to_slots` returned.

    Raises:
        UserError: for an unknown slot or mode, or mode lora or block without rank and scale.
    """
    return {name: _path_from_slots(name, slots) for name, slots in layers.items()}


def sized_path(sizes: Mapping[str, int]) -> LayerPath:
    """Return the path of a block in NOAH: the size of each slot, 0 or left out where it has none."""
    given = {slot: sizes.get(slot, 0) for slot in SIZED_SLOTS}
    return LayerPath(tuple((slot, SlotSpec(SIZED_SLOTS[slot], size)) for slot, size in given.items() if size))


def is_sized(genome: Genome) -> bool:
    """Tell whether a genome is NOAH's."""
    return any(slot in SIZED_SLOTS for path in genome.values() for slot, _ in path.slots)


def _path_from_slots(name: str, slots: Mapping[str, Any]) -> LayerPath:
    if any(slot in SIZED_SLOTS for slot in slots):
        other = next((slot for slot in slots if slot not in SIZED_SLOTS), None)
        if other is not None:
            raise UserError(f"genome: {name} has sizes of method noah, and '{other}', which is none of its slots.")
        wrong = [slot for slot, size in slots.items() if type(size) is not int or size < 0]
        if wrong:
            raise UserError(f"genome: {wrong[0]} of {name} is {slots[wrong[0]]}; expected its size, a number from 0.")
        return sized_path(slots)
    scales: dict[str, Any] = {}
    for slot, given in slots.items():
        values = {"mode": given} if isinstance(given, str) else given
        if not isinstance(values, dict) or not isinstance(values.get("mode"), str):
            raise UserError(f"genome: slot {slot} of {name} has no mode: {given}.")
        if values["mode"] in RANKED_MODES:
            rank, scales[slot] = values.get("rank"), values.get("scale")
            if (
                type(rank) is not int
                or rank < 1
                or type(scales[slot]) not in (int, float)
                or not math.isfinite(scales[slot])
            ):
                known = f'{{"mode": "{values["mode"]}", "rank": 8, "scale": 2.0}}'
                raise UserError(f"genome: slot {slot} of {name}: mode {values['mode']} is {known}.")
    try:
        path = make_path(slots, rank=1, alpha=1.0)
    except UserError as error:
        raise UserError(f"genome: {name}: {error}") from None
    return LayerPath(
        tuple((slot, dataclasses.replace(spec, scale=scales.get(slot, spec.scale))) for slot, spec in path.slots)
    )
