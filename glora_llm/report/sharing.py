"""Table and picture of the layers of a VLoRA run that share weights, and of each increment's size by layer and step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from glora_llm.errors import UserError
from glora_llm.plan.run_folder import RunFolder
from glora_llm.plan.sharing import SharedLinear, shared_linears
from glora_llm.report.drawing import BLUE, empty_figure, tidy
from glora_llm.report.run_record import METRICS, Series, read_metrics

INCREMENT = "vlora/increment/layer_"
COLUMNS = 6  # steps that the table shows
PICTURES = (".png", ".svg", ".pdf")


def show_sharing(path: Path, out: Path) -> None:
    """Print which layers share what and how large the increments are, and draw the increments by step and layer.

    Args:
        path: of a run.
        out: the picture to write; its ending says what kind. An earlier one is replaced.

    Raises:
        UserError: for no run, a run whose layers share nothing, or another ending; nothing is written then.
    """
    if out.suffix not in PICTURES:
        raise UserError(f"--out is '{out}'; expected a name that ends with {', '.join(PICTURES)}.")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; expected the name of a picture.")
    run = RunFolder(path)
    linears = shared_linears(run)
    sizes = increments_by_layer(path / METRICS)
    print(sharing_table(linears))
    if not sizes:
        print(f"\n{path / METRICS} has no increments yet: they are logged with the training loss.")
        return
    print("\n" + increment_table(sizes))
    out.parent.mkdir(parents=True, exist_ok=True)
    increment_figure(sizes).savefig(out, dpi=150)
    print(f"\n{out} written")


def increments_by_layer(file: Path) -> dict[int, Series]:
    """Return number of a layer -> norm of all its increments by step, as a run logs it."""
    series, _ = read_metrics(file)
    return {int(key.removeprefix(INCREMENT)): one for key, one in sorted(series.items()) if key.startswith(INCREMENT)}


def sharing_table(linears: Sequence[SharedLinear]) -> str:
    """Return a line a linear: its shape, the layers that share a base, rank, gains and parameters."""
    rows = [("linear", "O x I", "layers that share a base", "r", "gains", "parameters of dense")]
    for one in linears:
        share = f"{one.parameters / 1e6:.3f} M of {one.dense / 1e6:.3f} M ({100 * one.parameters / one.dense:.1f} %)"
        groups = ", ".join(numbers_in_words(group) for group in one.groups)
        gains = " ".join(one.gains) or "none"
        rows.append((one.name, f"{one.shape[0]} x {one.shape[1]}", groups, str(one.rank), gains, share))
    lines = _aligned(rows)
    first = [group[0] for one in linears for group in one.groups if group[0] not in one.adding]
    lines.append(
        "The first layer of each group is the base; each next one adds an increment."
        if first
        else "All layers of a group add an increment to its base."
    )
    return "\n".join(lines)


def numbers_in_words(numbers: Sequence[int]) -> str:
    """Return layers in a few words: `0-3` of neighbours, `0+4+8` of others."""
    if len(numbers) > 1 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return "+".join(map(str, numbers))


def increment_table(sizes: Mapping[int, Series]) -> str:
    """Return a line a layer: the norm of all its increments together, at some steps from the first to the last."""
    steps = sorted({int(step) for series in sizes.values() for step in series.steps})
    places = np.unique(np.linspace(0, len(steps) - 1, min(COLUMNS, len(steps))).round().astype(int))
    shown = [steps[place] for place in places]
    rows = [("layer", *(f"step {step}" for step in shown))]
    for layer, series in sizes.items():
        found = dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))
        rows.append((str(layer), *(f"{found[step]:.4g}" if step in found else "-" for step in shown)))
    title = "Norm of what each layer adds to the weights that its increments are added to (all its linears together):"
    return "\n".join([title, *_aligned(rows)])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def increment_figure(sizes: Mapping[int, Series]) -> Any:
    """Draw the size of each layer's increments by step, and by layer at the end."""
    figure = empty_figure((9.0, 3.6))
    by_step, by_layer = figure.subplots(1, 2, width_ratios=(1.3, 1))
    colours, most = colormaps["viridis"], max(sizes) or 1
    scale = ScalarMappable(Normalize(0, most), colours)
    for layer, series in sizes.items():
        by_step.plot(series.steps, series.values, color=colours(layer / most), linewidth=1.4)
    figure.colorbar(scale, ax=by_step, label="Layer")
    by_step.set(xlabel="Step", ylabel="Norm of the increments")
    last = [float(series.values[-1]) for series in sizes.values()]
    by_layer.bar(list(sizes), last, width=0.8, color=BLUE)
    by_layer.set(xlabel="Layer", ylabel="Norm of the increments at the end")
    for axes in (by_step, by_layer):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes, "y")
    return figure
