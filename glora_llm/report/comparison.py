"""Runs side by side, dense against VLoRA: loss by step, by time and by bytes of parameters, and a table.

It reads what a run wrote (metrics.jsonl, summary.json, recipe.yaml), so text and images look alike.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from glora_llm.errors import UserError
from glora_llm.plan.run_folder import RunFolder
from glora_llm.report.drawing import BLUE, GREY, ORANGE, VERMILLION, empty_figure, tidy
from glora_llm.schema import Recipe, VLoRASection
from glora_llm.schema.vlora import VLoRARates

COLOURS = (BLUE, VERMILLION, "#009E73", ORANGE, "#CC79A7", "#56B4E9", GREY)
STYLES = ("-", "--", ":", "-.")
SCORES = ("accuracy", "perplexity", "loss")  # the one that the table shows is the first that a run has
# Keys of the section vlora that `kind_of` says in words of its own, or that change no model.
SAID = ("layers_per_compound", "rank", "topology", "base_gradient", "form")
FLOAT32 = 4  # bytes of a trained parameter
SMOOTHED = 40  # the training loss is a running mean over this part of the steps


@dataclass(frozen=True)
class Compared:
    """The result of one run.

    Args:
        name: of its folder.
        kind: what sets it apart from the others; runs of one kind differ by their seed.
        steps, seconds, losses: of each logged step: its number, the time since the start (s), the training loss.
        validation: (step, seconds, loss) of each validation.
        summary: summary.json.
        checkpoint: bytes of the newest checkpoint; 0: there is none.
    """

    name: str
    kind: str
    steps: list[int]
    seconds: list[float]
    losses: list[float]
    validation: list[tuple[int, float, float]]
    summary: dict[str, Any]
    checkpoint: int

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the trained parameters in float32."""
        return FLOAT32 * int(self.summary["trained_parameters"])

    @property
    def score(self) -> tuple[str, float]:
        """The test score that matters most, and its name; the validation score where nothing was tested."""
        found = self.summary.get("test") or self.summary.get("validation") or {}
        plain = {name.partition("/")[2]: value for name, value in found.items()}
        found_as = {name.rpartition("/")[2]: name for name in reversed(plain)}  # of several test sets the first
        name = next((found_as[name] for name in SCORES if name in found_as), None)
        return (name, plain[name]) if name else ("loss", self.losses[-1])

    @property
    def last_loss(self) -> float:
        """The test loss, or the last one that there is."""
        tested = next((v for k, v in self.summary.get("test", {}).items() if k.endswith("/loss")), None)
        return tested if tested is not None else self.validation[-1][2] if self.validation else self.losses[-1]


def read_run(path: Path) -> Compared:
    """Read a finished run.

    Raises:
        UserError: when it is no run folder, or the run has not ended.
    """
    folder = RunFolder(path)
    recipe, summary = folder.recipe(), folder.summary()
    if "trained_parameters" not in summary:
        raise UserError(f"{path} has no result yet (summary.json): train it to its end, by the same command.")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps: list[int] = []
    seconds: list[float] = []
    losses: list[float] = []
    validation: list[tuple[int, float, float]] = []
    for line in lines:
        if "train/seconds_per_step" in line:
            passed = (line["step"] - (steps[-1] if steps else 0)) * line["train/seconds_per_step"]
            seconds.append((seconds[-1] if seconds else 0.0) + passed)
            steps.append(line["step"])
            losses.append(np.nan if line["train/loss"] is None else line["train/loss"])
        if line.get("validation/loss") is not None and steps:
            validation.append((line["step"], seconds[-1], line["validation/loss"]))
    return Compared(path.name, kind_of(recipe), steps, seconds, losses, validation, summary, _checkpoint(folder))


def kind_of(recipe: Recipe) -> str:
    """Return what sets a recipe's model apart, in words."""
    shared = recipe.vlora
    optimizer = ["muon"] if recipe.training.optimizer == "muon" else []
    if shared is None:
        kind = "dense" if recipe.adapter.method == "full" else recipe.adapter.method
        return ", ".join([kind, *optimizer])
    words = [f"k {in_words(shared.layers_per_compound or 'all')}", f"r {in_words(shared.rank)}"]
    words += [shared.topology] if shared.topology != "chain" else []
    words += ["first"] if shared.base_gradient != "all" else []
    usual = VLoRASection()
    for key in VLoRASection.model_fields:
        value = getattr(shared, key)
        if key not in SAID and value != getattr(usual, key):
            words.append(f"{key} {in_words(value)}")
    return f"VLoRA {', '.join([*words, *optimizer])}"


def in_words(value: Any) -> str:
    """Return a setting in a few words: `q_proj 6 gate_proj 3` of a mapping."""
    if isinstance(value, VLoRARates):
        value = value.model_dump(exclude_defaults=True)
    if isinstance(value, Mapping):
        return " ".join(f"{name} {in_words(one)}" for name, one in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _checkpoint(folder: RunFolder) -> int:
    found = sorted(folder.checkpoints.glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))
    return sum(file.stat().st_size for file in found[-1].rglob("*") if file.is_file()) if found else 0


def loss_figure(runs: Sequence[Compared]) -> Any:
    """Draw the loss of runs by step, by time, and by the bytes of their parameters.

    Lines are the training loss, smoothed; dots are the validation loss. Runs of one kind share a colour.
    """
    kinds = list(dict.fromkeys(run.kind for run in runs))
    figure = empty_figure((11.0, 4.2))
    by_step, by_time, by_size = figure.subplots(1, 3, width_ratios=(1, 1, 0.8), sharey=True)
    for run in runs:
        colour = COLOURS[kinds.index(run.kind) % len(COLOURS)]
        style = {"color": colour, "linestyle": STYLES[_place(run, runs) % len(STYLES)], "linewidth": 1.4}
        first = _place(run, runs) == 0
        smooth = _smooth(run.losses)
        by_step.plot(run.steps, smooth, label=run.kind if first else None, **style)
        by_time.plot(run.seconds, smooth, **style)
        for axes, places in ((by_step, [v[0] for v in run.validation]), (by_time, [v[1] for v in run.validation])):
            axes.plot(places, [v[2] for v in run.validation], "o", color=colour, markersize=3.5)
        by_size.plot(run.parameter_bytes, run.last_loss, "o", color=colour, markersize=7)
    by_step.set(xlabel="Step", ylabel="Loss (nats)")
    by_time.set(xlabel="Time of training steps (s)")
    by_size.set(xlabel="Trained parameters in float32 (bytes)", xlim=(0, 1.15 * max(r.parameter_bytes for r in runs)))
    by_size.xaxis.set_major_locator(MaxNLocator(4))
    by_size.xaxis.set_major_formatter(EngFormatter(unit="B"))
    for axes, title in ((by_step, "by step"), (by_time, "by time"), (by_size, "at the end, on test rows")):
        axes.set_title(title, fontsize=10)
        tidy(axes, "both")
    figure.legend(loc="outside lower center", ncols=min(4, len(kinds)), frameon=False)
    figure.suptitle("Loss: lines in training (smoothed), dots on held-out rows")
    return figure


def _place(run: Compared, runs: Sequence[Compared]) -> int:
    """Return which run of its kind it is."""
    return [other for other in runs if other.kind == run.kind].index(run)


def _smooth(losses: Sequence[float]) -> list[float]:
    width = max(1, len(losses) // SMOOTHED)
    return [float(np.nanmean(losses[max(0, end - width) : end])) for end in range(1, len(losses) + 1)]


def table(runs: Sequence[Compared]) -> str:
    """Return a Markdown table of the runs, and the mean and range of each kind that has several."""
    title = runs[0].score[0]
    lines = [
        f"| run | model | parameters | test {title} | seconds | peak memory | checkpoint |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        summary = run.summary
        lines.append(
            f"| {run.name} | {run.kind} | {summary['trained_parameters']:,} | {run.score[1]:.4f} | "
            f"{summary['seconds']:.0f} | {summary['peak_memory_gb']:.2f} GB | {run.checkpoint / 1e6:.1f} MB |"
        )
    for kind in dict.fromkeys(run.kind for run in runs):
        values = [run.score[1] for run in runs if run.kind == kind]
        if len(values) > 1:
            spread = f"{mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"
            lines.append(f"\n{kind}: test {title} {spread}, {len(values)} runs")
    return "\n".join(lines)
