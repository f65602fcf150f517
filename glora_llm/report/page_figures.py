"""The figures of a report's page, small enough to be read on a phone; long curves are thinned, and say how."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator, ScalarFormatter
from numpy.typing import NDArray

from glora_llm.report.drawing import BLUE, GREY, ORANGE, VERMILLION, empty_figure, tidy
from glora_llm.report.page_svg import GREEN, PINK, SKY
from glora_llm.report.run_record import RunRecord, Series

COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PINK, SKY, GREY)
STYLES = ("-", "--", ":", "-.")
MOST, GROUPS = 800, 400  # points of a curve that are drawn one by one; groups that a longer one is drawn in
SMOOTHED, LEAST_SMOOTHED = 40, 160  # a running mean is over this part of the steps, and drawn from so many steps on
SIZE = (4.5, 2.9)  # inches


class Thinned(NamedTuple):
    """A curve of at most `MOST` points: mean, lowest and highest value of each group of neighbouring steps."""

    steps: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def thin(series: Series) -> Thinned | None:
    """Return a long series in `GROUPS` groups of neighbouring steps, as many in each; None for one that is short.

    A value that is not finite counts in no group; a group without a finite value is a gap.
    """
    if len(series.steps) <= MOST:
        return None
    parts = np.array_split(np.arange(len(series.steps)), GROUPS)
    empty = (np.nan, np.nan, np.nan)
    rows = []
    for part in parts:
        values = series.values[part]
        values = values[np.isfinite(values)]
        rows.append((values.mean(), values.min(), values.max()) if len(values) else empty)
    mean, low, high = np.array(rows).T
    return Thinned(np.array([series.steps[part].mean() for part in parts]), mean, low, high)


def rule(series: Sequence[Series], smoothed: bool = False) -> str:
    """Return in words how curves were thinned and smoothed; empty: every logged value is drawn as it is."""
    longest = max((len(one.steps) for one in series), default=0)
    words = []
    if longest > MOST:
        words.append(
            f"{longest:,} logged values in {GROUPS} groups of neighbours: the line is a group's mean, the band reaches "
            "from its lowest to its highest value."
        )
    elif smoothed and longest >= LEAST_SMOOTHED:
        words.append(f"Pale: every logged value. Bold: mean of the last {max(2, longest // SMOOTHED)}.")
    lost = sum(int((~np.isfinite(one.values)).sum()) for one in series)
    if lost:
        words.append(f"{lost:,} values were not finite and are not drawn.")
    return " ".join(words)


def running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of each value and those before it, over 1 / `SMOOTHED` of all."""
    width = max(2, len(values) // SMOOTHED)
    finite = np.isfinite(values)
    sums = np.cumsum(np.where(finite, values, 0.0))
    counts = np.cumsum(finite)
    sums[width:], counts[width:] = sums[width:] - sums[:-width], counts[width:] - counts[:-width]
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def draw(axes: Any, series: Series, colour: str, smoothed: bool = False, **style: Any) -> None:
    """Draw a curve: a band and its means where it is long, else its values, pale below their running mean if asked."""
    style = {"linewidth": 1.5, "color": colour} | style
    thinned = thin(series)
    if thinned is not None:
        axes.fill_between(thinned.steps, thinned.low, thinned.high, color=colour, alpha=0.22, linewidth=0)
        axes.plot(thinned.steps, thinned.mean, **style)
    elif smoothed and len(series.steps) >= LEAST_SMOOTHED:
        axes.plot(series.steps, series.values, color=colour, linewidth=0.8, alpha=0.4)
        axes.plot(series.steps, running_mean(series.values), **style)
    else:
        axes.plot(series.steps, series.values, **style)


def axes_of(ylabel: str, size: tuple[float, float] = SIZE, xlabel: str = "Step") -> tuple[Any, Any]:
    """Return an empty figure and its axes."""
    figure = empty_figure(size)
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    tidy(axes, "y")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return figure, axes


def legend(figure: Any, count: int, columns: int = 2) -> None:
    """Write the legend below the axes, where it covers no curve; one curve needs none."""
    if count > 1:
        figure.legend(loc="outside lower center", ncols=min(columns, count))


def loss(run: RunRecord) -> Any:
    """Draw the training loss and the validation loss by step; dotted: where a launch went on."""
    figure, axes = axes_of("Loss (nats)")
    count = 0
    train, held_out = run.series.get("train/loss"), run.series.get("validation/loss")
    if train is not None:
        draw(axes, train, BLUE, smoothed=True, label="training")
        count += 1
    if held_out is not None:
        many = len(held_out.steps) > 30
        draw(axes, held_out, VERMILLION, marker=None if many else "o", markersize=4, label="validation")
        count += 1
    resumed = [launch["from_step"] for launch in run.launches if launch.get("from_step")]
    for number, step in enumerate(resumed):
        label = None if number else "a launch went on"
        axes.axvline(step, color=GREY, linestyle=":", linewidth=1.2, label=label)
    legend(figure, count + bool(resumed), 3)
    return figure


def scores(found: Mapping[str, Series], ylabel: str) -> Any:
    """Draw scores of the validation by step.

    Args:
        found: name -> values.
        ylabel: what the values are.
    """
    figure, axes = axes_of(ylabel)
    for number, (name, series) in enumerate(found.items()):
        few = "o" if len(series.steps) <= 30 else None
        style: dict[str, Any] = {"linestyle": STYLES[number // len(COLOURS) % len(STYLES)], "marker": few}
        draw(axes, series, COLOURS[number % len(COLOURS)], label=name, markersize=4, **style)
    legend(figure, len(found))
    return figure


def curve(series: Series, ylabel: str, line: tuple[str, float] | None = None, zero: bool = False) -> Any:
    """Draw one curve by step.

    Args:
        line: (label, value) of a dashed horizontal line.
        zero: begin the axis at 0.
    """
    figure, axes = axes_of(ylabel)
    draw(axes, series, BLUE, label="measured")
    finite = series.finite
    largest = finite.max() if len(finite) else 1.0
    if line is not None:
        axes.axhline(line[1], color=VERMILLION, linestyle="--", linewidth=1.3, label=line[0])
        largest = max(largest, line[1])
        legend(figure, 2)
    if zero:
        axes.set_ylim(0, 1.08 * largest or 1.0)
    if largest >= 1000 or (0 < largest < 0.01):
        axes.yaxis.set_major_formatter(EngFormatter(sep="") if largest >= 1000 else _scientific())
    return figure


def _scientific() -> Any:
    return FuncFormatter(lambda value, _: "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-"))


def by_layer(counts: Mapping[str, float], ylabel: str) -> Any:
    """Draw a bar for each layer; `other` stands at the end."""
    figure, axes = axes_of(ylabel, xlabel="Layer")
    axes.bar(range(len(counts)), list(counts.values()), width=0.8, color=BLUE)
    step = max(1, len(counts) // 8)
    shown = [place for place, name in enumerate(counts) if name == "other" or place % step == 0]
    axes.set_xticks(shown, [list(counts)[place] for place in shown])
    if max(counts.values()) >= 1000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.02)
    return figure


def together(
    curves: Mapping[str, tuple[Series | None, Series | None]], ylabel: str, xlabel: str = "Step", labelled: bool = True
) -> Any:
    """Draw one curve of several runs: training as a line, smoothed where it is long, validation as points.

    Args:
        curves: title of a run -> what was logged in training and in validation.
        labelled: name the runs in a legend.
    """
    more = 0.18 * ((len(curves) + 1) // 2) if labelled else -0.1
    figure, axes = axes_of(ylabel, (SIZE[0], 3.0 + more), xlabel)
    for number, (title, (train, held_out)) in enumerate(curves.items()):
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
        label: str | None = title if len(title) <= 40 else f"...{title[-37:]}"
        if train is not None:
            draw(axes, train, colour, smoothed=True, linestyle=style, label=label)
            label = None
        if held_out is not None:
            dots = {"linestyle": "none" if train is not None else style, "marker": "o", "markersize": 4}
            axes.plot(held_out.steps, held_out.values, color=colour, label=label, **dots)
    if labelled:
        legend(figure, max(2, len(curves)))
    return figure


def plain_numbers(axes: Any) -> None:
    """Write a score's axis without the letters of thousands."""
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))


def rate_ticks(axes: Any, rates: Sequence[float]) -> None:
    """Write the learning rates that were tried below a logarithmic axis, at most four of them."""
    shown = rates if len(rates) <= 4 else [rates[place] for place in np.linspace(0, len(rates) - 1, 4).astype(int)]
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(shown, [f"{rate:.0e}".replace("e-0", "e-") for rate in shown])
