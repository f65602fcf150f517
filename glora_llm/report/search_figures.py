"""Figures of a structure search. They are drawn on figures of their own: no pyplot, so no backend and no global state.

Colours are safe for colour-blind readers (Okabe and Ito's, viridis, and shades of blue), and differ in lightness too.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, SymmetricalLogLocator

from glora_llm.report.drawing import BLUE, GREY, ORANGE, VERMILLION, empty_figure, tidy
from glora_llm.schema.slots import SIZED_MODES, SIZED_SLOTS, SLOTS

if TYPE_CHECKING:  # a report draws without torch
    from glora_llm.glora.path import Genome, SlotSpec
    from glora_llm.search.archive import Scored
    from glora_llm.search.driver import Progress

KINDS = (BLUE, "#56B4E9", "#009E73", "#F0E442", ORANGE, VERMILLION, "#CC79A7", "#999999")
HATCHES = ("", "///", "...", "xx")  # where there are more kinds of linear than colours
LATER_IS_DARKER = ListedColormap(matplotlib.colormaps["viridis_r"](np.linspace(0.12, 1, 256)))
METRICS = {
    "loss": "Minus validation loss (nats/token)",
    "exact_match": "Exact match (share of validation rows)",
    "label_accuracy": "Label accuracy (share of validation rows)",
}
OTHER = "–"  # the column of what stands in no numbered layer


def pareto(
    candidates: Sequence["Scored"], front: Sequence["Scored"], limits: Sequence[tuple[str, float]], metric: str
) -> Figure:
    """Draw score against trainable parameters: all candidates by generation, the Pareto front, and the limits.

    Args:
        candidates: all that were scored on all rows.
        front: the best of them, see `pareto_front`.
        limits: (text, limit in trainable parameters); an infinite one is not drawn.
        metric: what the score is, see `SearchSection.metric`.
    """
    figure = empty_figure((7.5, 5.0))
    axes = figure.add_subplot()
    _dots(figure, axes, candidates)
    front = sorted(front, key=lambda one: one.parameters)
    axes.step(
        [one.parameters for one in front], [one.score for one in front], where="post", color=VERMILLION, marker="D",
        markersize=5, markeredgecolor="white", markeredgewidth=0.6, linewidth=1.8, zorder=4, label="Pareto front",
    )  # fmt: skip
    finite = [(text, limit) for text, limit in limits if math.isfinite(limit)]
    for number, (_, limit) in enumerate(finite):
        label = None if number else "limit"  # one entry for all of them
        axes.axvline(limit, color=GREY, linestyle="--", linewidth=1.1, zorder=1, label=label)
    _parameter_axis(axes, [one.parameters for one in candidates] + [limit for _, limit in finite])
    _limit_texts(axes, finite)
    axes.set(xlabel="Trainable parameters", ylabel=METRICS.get(metric, metric))
    figure.suptitle("Score against size of every candidate")
    tidy(axes, "both")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _dots(figure: Any, axes: Any, candidates: Sequence["Scored"]) -> None:
    parameters, scores = [one.parameters for one in candidates], [one.score for one in candidates]
    numbers = [one.generation for one in candidates]
    style = {"s": 18, "linewidths": 0, "alpha": 0.8, "zorder": 3}
    if len(set(numbers)) <= 1:
        label = f"candidate (all of generation {numbers[0]})" if numbers else "candidate"
        axes.scatter(parameters, scores, color=BLUE, label=label, **style)
        return
    dots = axes.scatter(parameters, scores, c=numbers, cmap=LATER_IS_DARKER, **style)
    axes.scatter([], [], color=LATER_IS_DARKER(0.6), label="candidate", **style)  # the legend's
    bar = figure.colorbar(dots, ax=axes, label="Generation", pad=0.02, aspect=30)
    bar.locator = MaxNLocator(integer=True)
    bar.solids.set_alpha(1)
    bar.outline.set_visible(False)


def _parameter_axis(axes: Any, places: Sequence[float]) -> None:
    """Make x logarithmic where places on it differ by more than 10 times; 0 has a place of its own then."""
    positive = [place for place in places if place > 0]
    if positive and max(positive) > 10 * min(places):
        subs = (1.0, 2.0, 5.0) if max(positive) < 1000 * min(positive) else (1.0,)
        if min(places) > 0:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=subs))
        else:
            axes.set_xscale("symlog", linthresh=min(positive), linscale=0.4)
            axes.xaxis.set_major_locator(SymmetricalLogLocator(axes.xaxis.get_transform(), subs=subs))
            axes.set_xlim(-0.2 * min(positive), 1.3 * max(positive))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _limit_texts(axes: Any, limits: Sequence[tuple[str, float]]) -> None:
    """Write each limit above its line, and higher where it would stand on its neighbour."""
    ends: list[float] = []  # of the texts on each level, from 0 to 1 along the axis
    for text, limit in sorted(limits, key=lambda pair: pair[1]):
        place = (axes.transScale + axes.transLimits).transform((limit, 0))[0]
        half = 0.008 * (len(text) + 3)
        level = next((level for level, end in enumerate(ends) if end < place - half), len(ends))
        ends[level : level + 1] = [place + half]
        axes.annotate(
            f"≤ {text}", (limit, 1), (0, 3 + 13 * level), xycoords=axes.get_xaxis_transform(),
            textcoords="offset points", ha="center", va="bottom", fontsize=9, color=GREY,
        )  # fmt: skip


def generations(history: Sequence["Progress"], metric: str | None = None) -> Figure:
    """Draw by generation the best score so far and the mean score; on top the samples that it took.

    A generation of several questions has the mean of their means, and the best and the samples after the last one.

    Args:
        history: of one search, in its order; where no candidate is scored on all rows yet there is no best.
        metric: what the score is, see `SearchSection.metric`.
    """
    questions: dict[int, list[Progress]] = {}
    for one in history:
        questions.setdefault(one.generation, []).append(one)
    numbers = sorted(questions)
    best = [(number, questions[number][-1].best) for number in numbers if math.isfinite(questions[number][-1].best)]
    figure = empty_figure((7.5, 4.6))
    axes = figure.add_subplot()
    size = 5.5 if len(numbers) <= 30 else 0
    axes.plot(
        numbers, [fmean(one.mean for one in questions[number]) for number in numbers], color=ORANGE, marker="s",
        markersize=size, linewidth=1.6, linestyle="--", label="mean of what was scored in the generation",
    )  # fmt: skip
    if best:
        places, scores = zip(*best, strict=True)
        label = "best so far, scored on all rows"
        axes.plot(places, scores, color=BLUE, marker="o", markersize=size or 5.5, linewidth=2.0, label=label)
    axes.set(xlabel="Generation", ylabel=METRICS.get(metric or "", metric or "Score (higher is better)"))
    figure.suptitle("Progress of the search")
    shown = numbers[:: max(1, math.ceil(len(numbers) / 11))]
    axes.set_xticks(shown)
    top = axes.secondary_xaxis("top")
    count = EngFormatter(sep="")
    top.set_xticks(shown, [count(float(f"{questions[number][-1].samples:.3g}")) for number in shown])
    top.set_xlabel("Forward passes so far (single rows)", color=GREY)
    top.tick_params(colors=GREY, length=0)
    top.spines["top"].set_visible(False)
    tidy(axes, "both")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def modes(genome: "Genome") -> Figure:
    """Draw the GLoRA paper's figure: which mode each slot of each layer has, or which size in NOAH.

    A panel is a kind of linear (or the blocks), its rows are the slots, its columns the layers. A cell stays white
    where a layer has no such linear. What stands in no numbered layer is in a column of its own.
    """
    kinds, columns, cells = _cells(genome)
    sized = any(slot in SIZED_SLOTS for path in genome.values() for slot, _ in path.slots)
    slots = tuple(SIZED_SLOTS) if sized else SLOTS
    colours = _mode_colours(path[slot] for path in genome.values() for slot in slots)
    order = {key: number for number, key in enumerate(colours)}
    grids = np.full((len(kinds), len(slots), len(columns)), np.nan)
    for name, (row, column) in cells.items():
        grids[row, :, column] = [order[_mode_key(genome[name][slot])] for slot in slots]
    figure, panels = _panels(kinds, len(columns), len(slots))
    cmap = ListedColormap([*colours.values()] or ["white"])
    edges = np.arange(len(columns) + 1) - 0.5, np.arange(len(slots) + 1) - 0.5
    for kind, panel, grid in zip(kinds, panels, np.ma.masked_invalid(grids), strict=True):
        panel.pcolormesh(*edges, grid, cmap=cmap, vmin=-0.5, vmax=len(colours) - 0.5, edgecolors="white", linewidth=0.7)
        panel.set_ylim(len(slots) - 0.5, -0.5)
        panel.set_yticks(range(len(slots)), slots)
        panel.set_xticks(*_layer_ticks(columns))
        panel.set_title(kind, loc="left", fontsize=9, pad=3)
        panel.tick_params(length=0, labelsize=8)
        panel.spines[:].set_visible(False)
    figure.suptitle("Mode of each slot of each layer")
    figure.supxlabel(_layer_label(columns), size=10)
    figure.supylabel("Slot", size=10)
    names = [f"{mode}, {'size' if sized else 'rank'} {rank}" if rank else mode for mode, rank in colours]
    handles = [Patch(facecolor=colour, label=name) for colour, name in zip(colours.values(), names, strict=True)]
    figure.legend(handles=handles, loc="outside right upper", title="Mode", frameon=False, alignment="left")
    return figure


def _panels(kinds: Sequence[str], columns: int, slots: int) -> tuple[Any, list[Any]]:
    """Return a figure and an empty panel for each kind: one below the other, or side by side where layers are few."""
    across = max(1, min(len(kinds), 32 // max(1, columns)))
    down = max(1, math.ceil(len(kinds) / across))
    cell = min(0.26, max(0.14, 9 / max(1, columns)))
    width = max(cell * columns, *(0.085 * len(kind) + 0.1 for kind in kinds), 0.6)
    figure = empty_figure((max(5.6, across * (width + 0.2) + 2.0), down * (cell * slots + 0.4) + 0.9))
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    full = len(kinds) == down * across  # or the numbers of the layers stand below every row
    for number, panel in enumerate(grid.flat):
        if number >= len(kinds):
            panel.remove()
        else:
            panel.tick_params(labelbottom=not full or number + across >= len(kinds), labelleft=number % across == 0)
    return figure, list(grid.flat[: len(kinds)])


def _mode_key(spec: "SlotSpec") -> tuple[str, int]:
    return spec.mode, spec.rank if spec.mode in SIZED_MODES else 0


def _mode_colours(specs: Iterable["SlotSpec"]) -> dict[tuple[str, int], str]:
    """Return a colour of each (mode, rank) that occurs: ranks from light to dark, then vector, scalar and none."""
    found = {_mode_key(spec) for spec in specs}
    colours: dict[tuple[str, int], str] = {}
    shadings = {"lora": "Blues", "block": "Greens", "bottleneck": "Oranges", "tokens": "Purples"}
    for mode, shading in shadings.items():
        ranks = sorted(key for key in found if key[0] == mode)
        shades = np.linspace(0.4, 1.0, len(ranks)) if len(ranks) > 1 else [0.8] * len(ranks)
        colours |= {key: to_hex(matplotlib.colormaps[shading](shade)) for key, shade in zip(ranks, shades, strict=True)}
    rest = {("vector", 0): "#F0B429", ("scalar", 0): VERMILLION, ("none", 0): "#E4E4E4"}
    return colours | {key: colour for key, colour in rest.items() if key in found}


def sizes(shares: Mapping[str, int]) -> Figure:
    """Draw where the trainable parameters are: by decoder layer, stacked by kind of linear, and by kind of linear.

    Args:
        shares: layer name -> trainable parameters.
    """
    kinds, columns, cells = _cells(shares)
    table = np.zeros((len(kinds), len(columns)))
    for name, cell in cells.items():
        table[cell] += shares[name]
    total = table.sum()

    width = min(11.0, max(2.6, 0.21 * len(columns)))
    figure = empty_figure((width + 4.4, max(3.8, 0.3 * len(kinds) + 1.5)))
    by_layer, by_kind = figure.subplots(1, 2, width_ratios=(width, 3.0))
    for number, (kind, row) in enumerate(zip(kinds, table, strict=True)):
        style = {
            "color": KINDS[number % len(KINDS)], "edgecolor": "white", "linewidth": 0.5, "label": kind,
            "hatch": HATCHES[number // len(KINDS) % len(HATCHES)],
        }  # fmt: skip
        by_layer.bar(range(len(columns)), row, bottom=table[:number].sum(0), width=0.85, **style)
        by_kind.barh(number, row.sum(), height=0.75, **style)
        share = f"{row.sum() / max(1, total):.1%}"
        by_kind.annotate(share, (row.sum(), number), (4, 0), textcoords="offset points", va="center")
    by_layer.set_xticks(*_layer_ticks(columns))
    by_layer.margins(x=0.02)
    by_layer.set_ylim(0, 1.06 * table.sum(0).max(initial=1))  # or the edges of stacked bars are taken for the end
    by_layer.set(xlabel=_layer_label(columns), ylabel="Trainable parameters")
    by_layer.set_title("By decoder layer", fontsize=10)
    by_layer.yaxis.set_major_formatter(EngFormatter(sep=""))
    by_kind.set_yticks(range(len(kinds)), kinds)
    by_kind.set_xlabel("Trainable parameters")
    by_kind.set_title("By kind of linear", fontsize=10)
    by_kind.xaxis.set_major_formatter(EngFormatter(sep=""))
    by_kind.xaxis.set_major_locator(MaxNLocator(4))
    by_kind.margins(x=0.18)
    tidy(by_layer, "y")
    tidy(by_kind, "x")
    figure.suptitle(f"{int(total):,} trainable parameters")
    return figure


def _cells(names: Iterable[str]) -> tuple[list[str], list[int | None], dict[str, tuple[int, int]]]:
    """Return the kinds of linear, the layers in order, and where in these two each linear stands.

    A kind is called by as much of the end of its name as no other kind has. Layer None, the last one, is that of names
    without a number.
    """
    found: dict[str, tuple[tuple[str, ...], int | None]] = {}
    for name in names:
        parts = name.split(".")
        number = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
        layer = None if number is None else int(parts[number])
        found[name] = tuple("*" if index == number else part for index, part in enumerate(parts)), layer
    kinds = list(dict.fromkeys(kind for kind, _ in found.values()))
    columns = sorted({layer for _, layer in found.values()}, key=lambda layer: (layer is None, layer or 0))

    def short(kind: tuple[str, ...]) -> str:
        ends = (kind[-length:] for length in range(1, len(kind)))
        return ".".join(next((e for e in ends if sum(other[-len(e) :] == e for other in kinds) == 1), kind))

    cells = {name: (kinds.index(kind), columns.index(layer)) for name, (kind, layer) in found.items()}
    return [short(kind) for kind in kinds], columns, cells


def _layer_ticks(columns: Sequence[int | None]) -> tuple[list[int], list[str]]:
    step = next(step for step, most in ((1, 12), (2, 34), (5, 100), (20, math.inf)) if len(columns) <= most)
    shown = [place for place, layer in enumerate(columns) if layer is None or layer % step == 0]
    return shown, [OTHER if columns[place] is None else str(columns[place]) for place in shown]


def _layer_label(columns: Sequence[int | None]) -> str:
    return f"Decoder layer ({OTHER}: in none)" if None in columns else "Decoder layer"
