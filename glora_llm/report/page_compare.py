"""A comparison of methods (`glora-llm compare` writes comparison.json) as a part of a report's page."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glora_llm.errors import UserError
from glora_llm.files.json_file import read_object
from glora_llm.report import page_figures as figures
from glora_llm.report.drawing import BLUE, GREY, VERMILLION
from glora_llm.report.page_blocks import (
    Code,
    Facts,
    Part,
    Picture,
    Table,
    Text,
    duration,
    gigabytes,
    machine,
    number,
    score,
)
from glora_llm.report.page_svg import inline_svg

COMPARISON = "comparison.json"
NOT_RUN = "not run"
ADVICE = "Start the same `glora-llm compare` again: it writes the file anew from the runs that are there."


def compare_part(folder: Path, name: str, out: Path) -> Part:
    """Return the part of a comparison's folder.

    Args:
        name: of letters, digits and hyphens, unique in the page.
        out: the file of the page, from which the links to the runs lead.

    Raises:
        UserError: when comparison.json is damaged.
    """
    found = read_object(folder / COMPARISON, ADVICE)
    methods = found.get("methods")
    if not isinstance(methods, list) or not all(isinstance(one, dict) and "name" in one for one in methods):
        raise UserError(f"{folder / COMPARISON} has no list of methods, each with its name. {ADVICE}")
    ran = [one for one in methods if one.get("verdict") != NOT_RUN and isinstance(one.get("mean"), int | float)]
    metric = str(found.get("score", "score"))
    lead = (
        f"{len(ran)} of {len(methods)} methods on recipe {found.get('recipe', '–')}, compared by {metric} "
        f"({'higher' if found.get('higher', True) else 'lower'} is better)"
        f"{f', each with {budget}' if (budget := found.get('budget')) else ''}."
    )
    part = Part(f"Comparison of methods: {folder.resolve().name}", name, lead)
    part.add(
        "Result", _table(methods, metric), *_not_run(methods), *_stopped(found, methods), *_means(ran, metric, name)
    )
    part.add("Learning rates", *_rates(ran, metric, name))
    part.add("Cost", _cost(ran))
    part.add("Trials", *_trials(found, methods, folder, out))
    part.add("How it was made", *_provenance(found, folder))
    return part


def _table(methods: Sequence[dict[str, Any]], metric: str) -> Table:
    rows = [
        [
            str(one["name"]), score(one.get("mean")),
            f"{score(one.get('low'))} to {score(one.get('high'))}" if "low" in one else "–",
            _verdict(one), number(one.get("p_value"), 2), number(len(one.get("scores") or []) or None),
            number(one.get("parameters")), _knob(one.get("knob")), _rate(one),
        ]
        for one in methods
    ]  # fmt: skip
    head = ["method", f"mean {metric}", "range", "verdict", "p", "seeds", "parameters", "set by", "rate"]
    return Table(f"Methods by {metric} on test rows", head, rows, " ".join(_notes(methods)))


def _verdict(one: dict[str, Any]) -> str:
    stopped = one.get("stopped_at")
    return str(one.get("verdict", "–")) if stopped is None else f"stopped at step {stopped}"


def _knob(knob: Any) -> str:
    """Return what brought a method to the budget, such as `rank 5`."""
    if isinstance(knob, dict):
        return ", ".join(f"{name} {value}" for name, value in knob.items()) or "–"
    return number(knob)


def _rate(one: dict[str, Any]) -> str:
    return f"{one['lr']:g}{'*' if one.get('lr_at_edge') else ''}" if one.get("lr") else "–"


def _notes(methods: Sequence[dict[str, Any]]) -> list[str]:
    """Return what the table's reader has to know beside it."""
    tests = dict.fromkeys(str(one["test"]) for one in methods if one.get("test"))
    notes = ["p: of the difference from the best mean", *([f"({'; '.join(tests)})"] if tests else [])]
    notes[-1] += "; level: it may be chance, or was not tested."
    if any(one.get("lr_at_edge") for one in methods):
        notes.append("*: the rate is at the edge of those that were tried, and a farther one may be better.")
    return notes


def _not_run(methods: Sequence[dict[str, Any]]) -> list[Text]:
    return [
        Text(f"{one['name']} was not run: {one.get('why') or 'no reason is given'}")
        for one in methods
        if one.get("verdict") == NOT_RUN
    ]


def _stopped(found: dict[str, Any], methods: Sequence[dict[str, Any]]) -> list[Text]:
    """Return by what the methods of a race were stopped, and the steps that each of them trained."""
    if not found.get("race"):
        return []
    stopped = [
        f"{one['name']} at step {one['stopped_at']} with {score(one.get('validation'))}"
        for one in methods
        if one.get("stopped_at") is not None
    ]
    spent = [f"{one['name']} {number(one['steps_spent'])}" for one in methods if one.get("steps_spent")]
    by = f"Stopped in the race, by validation {found.get('choice', 'score')}: {', '.join(stopped) or 'none'}."
    return [Text(by), Text(f"Steps trained: {', '.join(spent)}; {number(found.get('steps_spent'))} in all.")]


def _means(ran: Sequence[dict[str, Any]], metric: str, name: str) -> list[Picture]:
    if not ran:
        return []
    figure, axes = figures.axes_of("", (4.9, 0.9 + 0.36 * len(ran)), metric)
    figures.plain_numbers(axes)
    for place, one in enumerate(reversed(ran)):
        low, high = one.get("low", one["mean"]), one.get("high", one["mean"])
        axes.plot([low, high], [place, place], color=BLUE, linewidth=2.0, solid_capstyle="round")
        axes.plot(
            one.get("scores") or [], [place] * len(one.get("scores") or []), "o", color=BLUE, alpha=0.45, markersize=5
        )
        axes.plot([one["mean"]], [place], "D", color=VERMILLION, markersize=6)
    axes.set_yticks(range(len(ran)), [str(one["name"]) for one in reversed(ran)])
    axes.set_ylim(-0.6, len(ran) - 0.4)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    caption = "Means (diamonds), single seeds (dots) and their range (lines)."
    return [Picture(inline_svg(figure, f"{metric} of each method", f"{name}-means"), caption)]


def _rates(ran: Sequence[dict[str, Any]], metric: str, name: str) -> list[Any]:
    pictures = []
    for place, one in enumerate(ran):
        pairs, stopped = _pairs(one.get("rates")), _pairs(one.get("stopped_rates"))
        if len(pairs) + len(stopped) < 2:
            continue
        figure, axes = figures.axes_of(f"{metric}", (3.0, 2.3), "learning rate")
        axes.set_xscale("log")
        axes.plot([rate for rate, _ in pairs], [value for _, value in pairs], "-o", color=BLUE, markersize=4)
        axes.plot([rate for rate, _ in stopped], [value for _, value in stopped], "x", color=GREY, markersize=6)
        chosen = [(rate, value) for rate, value in pairs if rate == one.get("lr")]
        axes.plot([rate for rate, _ in chosen], [value for _, value in chosen], "D", color=VERMILLION, markersize=7)
        figures.rate_ticks(axes, [rate for rate, _ in sorted(pairs + stopped)])
        title = f"{one['name']}: {metric} on validation rows by learning rate"
        pictures.append(Picture(inline_svg(figure, title, f"{name}-rate-{place}"), f"{one['name']}", small=True))
    if not pictures:
        return []
    words = "Score on validation rows by learning rate. Diamond: the rate that was chosen; cross: stopped early."
    return [Text(words), *pictures]


def _pairs(rates: Any) -> list[tuple[float, float]]:
    """Return (rate, score) by rising rate, of those that have a score."""
    items = rates.items() if isinstance(rates, dict) else ()
    return sorted((float(rate), float(value)) for rate, value in items if isinstance(value, int | float))


def _cost(ran: Sequence[dict[str, Any]]) -> Table | None:
    columns = (
        ("tokens_per_second", "tokens/s", number), ("peak_gb", "peak memory", gigabytes),
        ("seconds", "time", duration), ("steps_to_target", "steps to the target", number),
        ("forgetting", "forgetting (nats)", score),
    )  # fmt: skip
    shown = [column for column in columns if any(one.get(column[0]) is not None for one in ran)]
    if not shown:
        return None
    rows = [[str(one["name"]), *(write(one.get(key)) for key, _, write in shown)] for one in ran]
    note = "Means over the seeds. Forgetting: how much the loss on a text that the run did not see has risen."
    return Table("Cost of each method", ["method", *(title for _, title, _ in shown)], rows, note)


def _trials(found: dict[str, Any], methods: Sequence[dict[str, Any]], folder: Path, out: Path) -> list[Any]:
    """Return every run of the comparison, folded; a folder is written as seen from the report's."""
    every = found.get("trials")
    if not isinstance(every, dict):
        every = {
            trial: {"method": one["name"], "folder": trial} for one in methods for trial in one.get("trials") or ()
        }
    rows = [
        [
            str(one.get("method", "–")), number(one.get("lr")), number(one.get("seed")), str(one.get("status", "–")),
            number(one.get("steps")), duration(one.get("wall_seconds")),
            os.path.relpath(folder / str(one.get("folder", name)), out.resolve().parent),
        ]
        for name, one in every.items()
        if isinstance(one, dict)
    ]  # fmt: skip
    if not rows:
        return []
    head = ["method", "rate", "seed", "status", "steps", "time", "run folder"]
    note = "A report of one: glora-llm report RUN_FOLDER."
    return [Table(f"All {len(rows)} runs", head, rows, note, folded=True)]


def _provenance(found: dict[str, Any], folder: Path) -> list[Any]:
    hardware = found.get("hardware")
    facts = [
        ("folder", str(folder)),
        ("hardware", machine(hardware) if isinstance(hardware, dict) else str(hardware or "not recorded")),
    ]
    versions = found.get("versions")
    if isinstance(versions, dict):
        facts.append(("versions", ", ".join(f"{key} {value}" for key, value in versions.items())))
    if found.get("commit"):
        facts.append(("commit", str(found["commit"])))
    blocks: list[Any] = [Facts(facts)]
    if found.get("command"):
        command = found["command"]
        blocks.append(Code("The command", command if isinstance(command, str) else " ".join(map(str, command))))
    return blocks
