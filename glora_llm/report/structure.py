"""The trained structure of a run, layer by layer: from the names and shapes in its weight files and its genome."""

import contextlib
import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from glora_llm.files.json_file import read_object
from glora_llm.plan.part_names import SLOT, in_order, kind_of_module, layer_of, owner_of, slot_of
from glora_llm.report.run_record import DAMAGED, RunRecord
from glora_llm.schema.slots import SIZED_PARTS, SIZED_SLOTS, SLOTS

LONGEST_HEADER = 100 << 20  # bytes, as the safetensors library allows
BASE_NAME = "base_model.model."  # what PEFT puts before the base model's names
USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # files list names by alphabet
Shapes = dict[str, tuple[int, ...]]


class Cell(NamedTuple):
    """The mode of one slot of one linear; rank 0: the mode has none."""

    mode: str
    rank: int = 0


@dataclass
class Structure:
    """The trained parts of a model.

    Attributes:
        cells: linear -> slot -> how it is parameterised. A PEFT method has one slot, which is called as the method.
        by_slot, by_kind, by_layer: trained numbers, each dividing the same total.
        source: where it was read.
    """

    source: str
    cells: dict[str, dict[str, Cell]] = field(default_factory=dict)
    by_slot: dict[str, int] = field(default_factory=dict)
    by_kind: dict[str, int] = field(default_factory=dict)
    by_layer: dict[str, int] = field(default_factory=dict)

    def count(self, name: str, number: int) -> None:
        """Add the numbers of one tensor."""
        for table, key in (
            (self.by_slot, slot_of(name)), (self.by_kind, kind_of_module(name)), (self.by_layer, layer_of(name)),
        ):  # fmt: skip
            table[key] = table.get(key, 0) + number

    @property
    def total(self) -> int:
        """All trained numbers."""
        return sum(self.by_kind.values())

    @property
    def slots(self) -> list[str]:
        """The slots that some linear has, in their usual order."""
        found = {slot for path in self.cells.values() for slot in path}
        return [slot for slot in SLOTS if slot in found] + sorted(found - set(SLOTS))


def read_structure(run: RunRecord) -> Structure | None:
    """Return what a run trained; None where no weights of it are there yet, or their files are damaged.

    Of a supernet it is what the search chose, in the sizes that the supernet's tensors give; without a search only
    the supernet's numbers.
    """
    files = _weight_files(run)
    shapes = _read_shapes(files)
    if not shapes:
        return None
    adapter = run.recipe.adapter
    structure = Structure(str(files[0].relative_to(run.folder.path)))
    if run.folder.genome.is_file() and adapter.method in ("glora", "noah"):
        genome = read_object(run.folder.genome, DAMAGED)
        structure.source = "genome.json"
        _add_genome(structure, genome, shapes if adapter.is_supernet else {})
    elif adapter.method == "glora" and not adapter.is_supernet:
        _add_tensors(structure, shapes)
    elif not adapter.is_full and adapter.method != "glora":
        _add_method(structure, shapes, adapter.method)
    if not structure.total:
        for name, shape in shapes.items():
            structure.count(name.removeprefix(BASE_NAME), math.prod(shape))
    structure.by_kind = {kind: structure.by_kind[kind] for kind in sorted(structure.by_kind, key=place_of)}
    structure.by_slot = dict(sorted(structure.by_slot.items()))
    structure.by_layer = in_order(structure.by_layer)
    return structure


def place_of(kind: str) -> int:
    """Return where a kind of linear stands in a decoder layer; others stand behind, in the order in which they came."""
    name = kind.rpartition(".")[2]
    return USUAL.index(name) if name in USUAL else len(USUAL)


def _weight_files(run: RunRecord) -> list[Path]:
    """Return the files of the final weights, or of the newest checkpoint's adapter."""
    final = sorted(run.folder.trained(run.recipe).glob("*.safetensors"))
    if final:
        return final
    saved = [path for path in run.folder.checkpoints.glob("step-*") if path.name[5:].isdigit()]
    newest = sorted(saved, key=lambda path: int(path.name[5:]), reverse=True)
    return next((files for path in newest if (files := sorted((path / "adapter").glob("*.safetensors")))), [])


def _read_shapes(files: Iterable[Path]) -> Shapes:
    """Return tensor -> shape of safetensors files, from their headers alone."""
    shapes: Shapes = {}
    for file in files:
        header: Any = {}
        with contextlib.suppress(OSError, ValueError, struct.error), file.open("rb") as stream:
            size = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(size)) if size <= LONGEST_HEADER else {}
        if isinstance(header, dict):
            shapes |= {
                name: tuple(entry["shape"])
                for name, entry in header.items()
                if isinstance(entry, dict) and isinstance(entry.get("shape"), list)
            }
    return shapes


def _add_tensors(structure: Structure, shapes: Shapes) -> None:
    """Read the mode of every slot off the tensors that it has."""
    for name, shape in shapes.items():
        found, kind = SLOT.search(name), name.rpartition(".")[2]
        if found is None or not found[1]:
            continue
        path = structure.cells.setdefault(owner_of(name).removeprefix(BASE_NAME), {})
        if kind in ("down", "block_down"):
            path[found[1]] = Cell("lora" if kind == "down" else "block", shape[-1])
        elif kind in ("vector", "scalar"):
            path[found[1]] = Cell(kind)


def _add_method(structure: Structure, shapes: Shapes, method: str) -> None:
    """Give every linear that a PEFT method trains one slot, with the rank where it has a factor of LoRA's name."""
    for name, shape in shapes.items():
        if SLOT.search(name) is None and "lora" not in name and "modules_to_save" in name:
            continue
        path = structure.cells.setdefault(owner_of(name).removeprefix(BASE_NAME), {})
        before = path.get(method, Cell(method))
        path[method] = Cell(method, shape[0]) if ".lora_A" in name and len(shape) == 2 else before


def _add_genome(structure: Structure, genome: dict[str, Any], shapes: Shapes) -> None:
    """Add what a genome says, and count it by the shapes of a supernet's tensors where there are such."""
    for linear, slots in genome.items():
        path = structure.cells.setdefault(linear, {})
        for slot, setting in slots.items() if isinstance(slots, dict) else ():
            if slot in SIZED_SLOTS and setting:
                path[slot] = Cell(SIZED_SLOTS[slot], int(setting))
                for name, number in _chosen_of_noah(f"{BASE_NAME}{linear}.noah_parts.", slot, int(setting), shapes):
                    structure.count(name.removeprefix(BASE_NAME), number)
                continue
            mode, rank = (
                (setting, 0) if isinstance(setting, str | int) else (setting.get("mode"), setting.get("rank", 0))
            )
            if mode in (None, 0, "none"):
                continue
            path[slot] = Cell(str(mode), int(rank))
            for name, number in _chosen(f"{BASE_NAME}{linear}.slot_{slot}", path[slot], shapes):
                structure.count(name.removeprefix(BASE_NAME), number)


def _chosen(stem: str, cell: Cell, shapes: Shapes) -> Iterable[tuple[str, int]]:
    """Yield tensor -> trained numbers of one slot in one mode; smaller ranks use the first columns of the largest."""
    if cell.rank:
        start = "block_" if cell.mode == "block" else ""
        down, up = f"{stem}.{start}down", f"{stem}.{start}up"
        if down in shapes and up in shapes:
            yield down, shapes[down][0] * cell.rank
            yield up, shapes[up][1] * cell.rank
    elif f"{stem}.{cell.mode}" in shapes:
        yield f"{stem}.{cell.mode}", math.prod(shapes[f"{stem}.{cell.mode}"])


def _chosen_of_noah(stem: str, slot: str, size: int, shapes: Shapes) -> Iterable[tuple[str, int]]:
    """Yield tensor -> trained numbers of one slot of a block of NOAH's in one size."""
    for part, side in SIZED_PARTS[slot].items():
        if shape := shapes.get(stem + part):
            yield stem + part, math.prod(shape) if side is None else math.prod(shape) // shape[side] * size
