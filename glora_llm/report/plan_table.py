"""Print a forecast of a recipe as tables of at most 100 columns."""

import textwrap
from collections.abc import Iterable
from typing import Any

from glora_llm.plan.forecast import Forecast
from glora_llm.plan.memory import GB, RESERVE
from glora_llm.plan.phases import PARTS

WIDTH, COLUMN = 100, 11
FEW_LAYERS = 4  # that are named before the rest is told as a range


def print_forecast(found: Forecast, name: str, left_out: str) -> None:
    """Print a forecast.

    Args:
        name: of the recipe.
        left_out: why the data were not read; empty: they were.
    """
    from rich.console import Console

    console = Console(width=WIDTH)

    def say(text: str) -> None:
        indent = " " * (len(text) - len(text.lstrip()) + COLUMN)
        filled = textwrap.fill(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
        console.print(filled, highlight=False, markup=False)

    say(f"{name} on {found.machine.describe()}, in {found.dtype}: computed, not measured")
    say(f"batch      {found.batch}" + (f": {left_out}" if left_out else ""))
    say(f"trained    {found.counts.total:,} parameters beside {found.frozen:,} frozen ones")
    for title, counts in (("slot", found.counts.by_slot), ("kind", found.counts.by_kind)):
        say(f"  by {title}  {_listed(counts)}")
    say(f"  by layer {_layers(found.counts.by_layer)}")
    console.print(_memory(found))
    for line in _verdict(found):
        say(line)
    say("disk       " + "; ".join(f"{what} {_size(size)}" for what, size in found.disk.items()))
    for line in _time(found):
        say(line)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items())


def _layers(counts: dict[str, int]) -> str:
    """Return the layers with their counts; neighbours that are alike as a range."""
    groups: list[tuple[str, str, int]] = []
    for name, number in counts.items():
        if groups and groups[-1][2] == number and name.isdigit():
            groups[-1] = (groups[-1][0], name, number)
        else:
            groups.append((name, name, number))
    shown = [f"{first if first == last else f'{first} to {last}'}: {number:,} each" for first, last, number in groups]
    if len(shown) > 2 * FEW_LAYERS:
        shown = [*shown[:FEW_LAYERS], "...", *shown[-FEW_LAYERS:]]
    return ", ".join(text.removesuffix(" each") if " to " not in text else text for text in shown)


def _memory(found: Forecast) -> Any:
    from rich.table import Table

    where = "resident in each process above the imports" if found.machine.on_cpu else "on each GPU"
    unit, name = (GB, "GB") if found.peak.total >= GB else (1e6, "MB")
    print(f"{name} {where}, at the peak of each phase:")
    table = Table(padding=(0, 1), box=None)
    table.add_column("part")
    for phase in found.phases:
        table.add_column(phase.name, justify="right")
    for part in PARTS:
        if any(phase.parts.get(part) for phase in found.phases):
            table.add_row(part, *_cells((phase.parts.get(part, 0) for phase in found.phases), unit))
    table.add_row("together", *_cells((phase.total for phase in found.phases), unit), style="bold")
    if not found.machine.on_cpu:
        table.add_row("on the host", *_cells((phase.host for phase in found.phases), unit))
    return table


def _cells(sizes: Iterable[int], unit: float) -> list[str]:
    """Return numbers of three digits or more; what is nothing, or rounds to it, stays empty."""
    values = (size / unit for size in sizes)
    return [f"{value:.2f}" if 0.005 <= value < 10 else f"{value:.1f}" if value >= 10 else "" for value in values]


def _size(size: int) -> str:
    return f"{size / GB:.2f} GB" if size >= GB else f"{size / 1e6:.1f} MB"


def _verdict(found: Forecast) -> list[str]:
    peak, memory = found.peak, found.machine.memory
    most = f"peak       {_size(peak.total)}, {'at rest' if peak.name == 'at rest' else f'while {peak.name}'}"
    if found.unmodelled:
        fits = f"; does NOT fit into {memory / GB:.1f} GB" if found.fits is False and memory is not None else ""
        return [f"{most}, at least{fits}: {found.unmodelled}"]
    if memory is None:
        return [f"{most}; give --gpu-memory GB to be told whether it fits"]
    beside = "the imports" if found.machine.on_cpu else f"{RESERVE / GB:.0f} GB for CUDA's context and fragments"
    if found.fits:
        return [f"{most}; fits into {memory / GB:.1f} GB beside {beside}"]
    lines = [f"{most}; does NOT fit into {memory / GB:.1f} GB beside {beside}. What would:"]
    lines += [f"  {change}  ({_size(size)})" for change, size in found.changes.items()]
    if not found.changes:
        lines.append("  no micro_batch, checkpointing, rank, quantization or ZeRO stage; use more GPUs, or larger ones")
    return lines


def _time(found: Forecast) -> list[str]:
    time = found.time
    work = f"time       {time.step_flops / 1e12:.3g} TFLOP a step of {time.tokens:,.0f} tokens"
    if time.least_seconds is None or time.seconds is None or time.peak_flops is None:
        why = time.source if time.peak_flops is None else "the number of steps follows from the data"
        return [f"{work}; no time is given: {why}"]
    return [
        f"{work}, {time.steps:,} steps: {_span(time.least_seconds)} at the whole peak of {time.peak_flops / 1e12:.3g} "
        f"TFLOP/s a device ({time.source}); {_span(time.seconds)} at {time.share:.0%} of it, which is assumed, not "
        "measured. Recomputed activations, loading, evaluation, search and merge are not counted",
    ]


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
