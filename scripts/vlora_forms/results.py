"""What the runs of a comparison reached: a Markdown table, and a figure of score against bytes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.ticker import EngFormatter

from glora_llm.report.comparison import Compared, read_run
from glora_llm.report.drawing import BLUE, GREY, VERMILLION, empty_figure, tidy
from scripts.vlora_forms.forms import TWINS, Table
from scripts.vlora_forms.runs import finished

LEAVES, REACHES = 10, 50  # steps of the running means by which a plateau, and a loss that is reached, are told
RIVAL = "dense-narrow"  # whose last training loss is the one that others reach


@dataclass(frozen=True)
class Form:
    """The runs of one form.

    Args:
        name: of the form.
        runs: seed -> its run.
        values: their scores, in the order of `runs`.
    """

    name: str
    runs: dict[int, Compared]
    values: list[float]

    @property
    def bytes(self) -> int:
        """Of the saved model: its parameters in float32."""
        return next(iter(self.runs.values())).parameter_bytes


def score_of(summary: Mapping[str, Any], name: str) -> float | None:
    """Return the score `split/name` of a summary."""
    value: float | None = summary.get(name.partition("/")[0], {}).get(name)
    return value


def read_forms(out: Path, table: Table, forms: Sequence[str], seeds: Sequence[int]) -> tuple[str, list[Form]]:
    """Return the score that all finished runs have, and the forms with runs, the best first."""
    folders = {form: {seed: out / f"{form}-{seed}" for seed in seeds} for form in forms}
    ended = {form: {s: f for s, f in found.items() if finished(f) is not None} for form, found in folders.items()}
    runs = {form: {s: read_run(f) for s, f in found.items()} for form, found in ended.items() if found}
    every = [run.summary for found in runs.values() for run in found.values()]
    name = next((n for n in table.scores if all(score_of(summary, n) is not None for summary in every)), "")
    if not every or not name:
        return "", []
    made = []
    for form, found in runs.items():
        values = [value for run in found.values() if (value := score_of(run.summary, name)) is not None]
        made.append(Form(form, found, values))
    return name, sorted(made, key=lambda form: mean(form.values), reverse=table.best == "max")


def first_below(run: Compared, bound: float, steps: int) -> int | None:
    """Return the place of the first logged step at which the mean loss of the last `steps` is below a bound."""
    for place in range(steps, len(run.losses) + 1):
        if mean(run.losses[place - steps : place]) < bound:
            return place - 1
    return None


def training_table(table: Table, name: str, forms: Sequence[Form]) -> str:
    """Return what each form reached: bytes, mean and range of the score, plateau, and time to the rival's loss."""
    means = {form.name: mean(form.values) for form in forms}
    rival = next((form for form in forms if form.name == RIVAL), None)
    lines = [
        f"| form | parameters | MB | {name} (range, seeds) | of dense | plateau | seconds | to {RIVAL}'s loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for form in forms:
        lowest, highest = min(form.values), max(form.values)
        score = f"{mean(form.values):.4f} ({lowest:.4f} to {highest:.4f}, {len(form.values)})"
        share = f"{means[form.name] / means['dense']:.3f}" if "dense" in means else "-"
        leaves = ", ".join(_step(run, first_below(run, table.entropy, LEAVES)) for run in form.runs.values())
        seconds = mean(run.seconds[-1] for run in form.runs.values())
        lines.append(
            f"| {form.name} | {form.bytes // 4:,} | {form.bytes / 1e6:.1f} | {score} | {share} | {leaves} | "
            f"{seconds:.0f} | {_time_to_rival(form, rival)} |"
        )
    return "\n".join(lines)


def _step(run: Compared, place: int | None) -> str:
    return "never" if place is None else str(run.steps[place])


def _time_to_rival(form: Form, rival: Form | None) -> str:
    """Return by seeds the seconds of training steps until the loss that the rival of that seed ends with."""
    if rival is None or form.name == rival.name:
        return "-"
    cells = []
    for seed, run in form.runs.items():
        if seed in rival.runs and len(rival.runs[seed].losses) >= REACHES:
            place = first_below(run, mean(rival.runs[seed].losses[-REACHES:]), REACHES)
            cells.append("never" if place is None else f"{run.seconds[place]:.0f}")
    return ", ".join(cells) or "-"


def dense_table(name: str, forms: Sequence[Form]) -> str:
    """Return what each form lost of a dense model: by truncated SVD alone, and after training."""
    lines = [
        f"| form | parameters | dense {name} | truncated SVD alone | trained on | x dense (range, seeds) | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for form in forms:
        ratios, cells = [], []
        for run in form.runs.values():
            stages = (run.summary.get("dense") or run.summary.get("teacher") or {}, run.summary.get("at_start", {}))
            before, start = (stage.get(name, math.nan) for stage in stages)
            after = score_of(run.summary, name) or math.nan
            cells.append((before, start, after))
            ratios.append(after / before)
        columns = " | ".join(f"{mean(column):.4f}" for column in zip(*cells, strict=True))
        seconds = mean(run.seconds[-1] for run in form.runs.values())
        spread = f"{mean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)})"
        lines.append(f"| {form.name} | {form.bytes // 4:,} | {columns} | {spread} | {seconds:.0f} |")
    return "\n".join(lines)


def bytes_figure(name: str, forms: Sequence[Form]) -> Any:
    """Draw the mean score against the bytes of the saved model, with the seeds' range; dense sizes are one line."""
    figure = empty_figure((7.0, 4.6))
    axes = figure.subplots()
    dense = sorted((form for form in forms if form.name in ("dense", *TWINS)), key=lambda form: form.bytes)
    line = [form for form in dense if form.name != "dense-shallow"]  # narrower and narrower
    axes.plot([form.bytes for form in line], [mean(form.values) for form in line], "-", color=GREY, linewidth=1.2)
    for form in forms:
        value = mean(form.values)
        reach = [[value - min(form.values)], [max(form.values) - value]]
        colour = GREY if form in dense else VERMILLION if form.name == "paper" else BLUE
        axes.errorbar(form.bytes, value, yerr=reach, fmt="o", color=colour, capsize=3, markersize=5, linewidth=1.2)
        axes.annotate(
            form.name, (form.bytes, value), xytext=(6, 3), textcoords="offset points", fontsize=8, color=colour
        )
    axes.set(xlabel="Saved model in float32 (bytes)", ylabel=name.replace("_", " "))
    axes.set_xlim(0, 1.2 * max(form.bytes for form in forms))
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.set_title("dense models in grey, the paper's form in red, other forms of VLoRA in blue", fontsize=9)
    tidy(axes, "both")
    return figure
