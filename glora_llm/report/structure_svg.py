"""The picture of a structure: linears and slots down, layers across, a colour for each mode, darker for higher ranks.

Written as SVG directly: neighbours that are alike are one rectangle, which keeps it small and lets every part say what
it is.
"""

import re
from collections.abc import Iterator

from markupsafe import Markup, escape

from glora_llm.plan.part_names import LAYER
from glora_llm.report.structure import Cell, Structure, place_of
from glora_llm.schema.slots import SIZED_SLOTS

CELL, WIDEST = 11, 480  # pixels: least width of a layer; of all, where layers are few
ROW, GAP, LETTER = 13, 8, 6.2  # pixels: height of a slot, between linears, width of a letter
CLASSES = {"lora": "m-lora", "block": "m-block", "vector": "m-vector", "scalar": "m-scalar", "none": "m-none"}
OTHER = "other"


def structure_svg(structure: Structure, name: str) -> Markup | None:
    """Return the picture, or None where no linear has a slot.

    Args:
        name: unique in the page.
    """
    kinds, layers = _kinds(structure)
    if not kinds:
        return None
    slots = structure.slots
    several = len(slots) > 1
    ranks = sorted({cell.rank for path in structure.cells.values() for cell in path.values() if cell.rank})
    left = LETTER * max(len(kind) for kind in kinds) + (22 if several else 10)
    cell = max(CELL, min(40, WIDEST // len(layers)))
    pieces, top = [], 4.0
    for kind, by_layer in kinds.items():
        height = ROW * len(slots)
        pieces.append(_text(left - (20 if several else 8), top + height / 2 + 4, kind, "end"))
        for row, slot in enumerate(slots):
            y = top + row * ROW
            if several:
                pieces.append(_text(left - 5, y + 10, slot, "end", "small"))
            for first, last, found in _runs([_cell(by_layer, layer, slot) for layer in layers]):
                where = layers[first] if first == last else f"{layers[first]} to {layers[last]}"
                place = (left + first * cell, y, (last - first + 1) * cell - 1, ROW - 1.5)
                pieces.append(_rectangle(place, found, ranks, f"{kind}, {slot}, layer {where}"))
        top += height + GAP
    step = max(1, -(-len(layers) // 16))
    for number, layer in enumerate(layers):
        if number % step == 0 or layer == OTHER:
            pieces.append(
                _text(left + (number + 0.5) * cell - 0.5, top + 8, "–" if layer == OTHER else layer, "middle")
            )
    middle = left + len(layers) * cell / 2
    pieces.append(_text(middle, top + 24, "Layer (–: in none)" if OTHER in layers else "Layer", "middle"))
    width, bottom = left + len(layers) * cell + 14, top + 30
    title = f"Mode of {'each slot' if several else 'the adapter'} of {', '.join(kinds)}, by layer"
    head = (
        f'<svg class="structure" viewBox="0 0 {width:.0f} {bottom:.0f}" width="{width:.0f}" role="img" '
        f'aria-labelledby="{name}-title"><title id="{name}-title">{escape(title)}</title>'
    )
    return Markup(head + "\n".join(pieces) + "</svg>")


def modes(structure: Structure) -> list[tuple[str, str, str]]:
    """Return (class, opacity, words) of every mode and rank that occurs, for the legend."""
    cells = {path.get(slot, Cell("none")) for path in structure.cells.values() for slot in structure.slots}
    ranks = sorted({cell.rank for cell in cells if cell.rank})
    order = {mode: place for place, mode in enumerate(CLASSES)}
    found = sorted(cells, key=lambda cell: (order.get(cell.mode, len(order)), cell.mode, cell.rank))
    return [(_class(cell), f"{_opacity(cell, ranks):.2f}", in_words(cell)) for cell in found]


def in_words(cell: Cell) -> str:
    """Return `lora, rank 8`, or the mode alone where it has no rank; of NOAH's adapter and prompts their size."""
    word = "size" if cell.mode in SIZED_SLOTS.values() and cell.mode != "lora" else "rank"
    return f"{cell.mode}, {word} {cell.rank}" if cell.rank else cell.mode


def summary_rows(structure: Structure) -> list[list[str]]:
    """Return for each kind of linear what its slots are, and in how many layers where these differ."""
    kinds, layers = _kinds(structure)
    rows = []
    for kind, by_layer in kinds.items():
        cells = []
        for slot in structure.slots:
            found = [_cell(by_layer, layer, slot) for layer in layers if layer in by_layer]
            counts = {cell: found.count(cell) for cell in dict.fromkeys(found)}
            words = [(in_words(cell), count) for cell, count in counts.items() if cell]
            cells.append(words[0][0] if len(words) == 1 else "; ".join(f"{word} ({count})" for word, count in words))
        rows.append([kind, str(len(by_layer)), *cells])
    return rows


def _kinds(structure: Structure) -> tuple[dict[str, dict[str, dict[str, Cell]]], list[str]]:
    """Return kind of linear -> layer -> slot -> cell, and the layers in order."""
    kinds: dict[str, dict[str, dict[str, Cell]]] = {}
    layers: set[str] = set()
    for linear, path in structure.cells.items():
        found = LAYER.search(f".{linear}.")
        layer = found[1] if found else OTHER
        kind = re.split(r"\.\d+\.", f".{linear}")[-1].strip(".")
        kinds.setdefault(kind, {})[layer] = path
        layers.add(layer)
    ends = [kind.rpartition(".")[2] for kind in kinds]
    short = {kind: end if ends.count(end) == 1 else kind for kind, end in zip(kinds, ends, strict=True)}
    order = sorted(layers, key=lambda layer: (layer == OTHER, int(layer) if layer.isdigit() else 0))
    return {short[kind]: kinds[kind] for kind in sorted(kinds, key=place_of)}, order


def _cell(by_layer: dict[str, dict[str, Cell]], layer: str, slot: str) -> Cell | None:
    """Return what a slot is in a layer; None where the layer has no such linear."""
    return by_layer[layer].get(slot, Cell("none")) if layer in by_layer else None


def _runs(cells: list[Cell | None]) -> Iterator[tuple[int, int, Cell]]:
    """Yield (first, last, cell) of neighbours that are alike."""
    first = 0
    for place in range(1, len(cells) + 1):
        if place == len(cells) or cells[place] != cells[first]:
            found = cells[first]
            if found is not None:
                yield first, place - 1, found
            first = place


def _rectangle(place: tuple[float, float, float, float], cell: Cell, ranks: list[int], where: str) -> str:
    x, y, width, height = place
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{_class(cell)}" '
        f'opacity="{_opacity(cell, ranks):.2f}"><title>{escape(f"{where}: {in_words(cell)}")}</title></rect>'
    )


def _class(cell: Cell) -> str:
    return CLASSES.get(cell.mode, "m-method")


def _opacity(cell: Cell, ranks: list[int]) -> float:
    """Return 1 for the highest rank, and 0.4 for the lowest of several."""
    if not cell.rank or len(ranks) < 2:
        return 1.0
    return 0.4 + 0.6 * ranks.index(cell.rank) / (len(ranks) - 1)


def _text(x: float, y: float, text: str, anchor: str, size: str = "") -> str:
    kind = f' class="{size}"' if size else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'
