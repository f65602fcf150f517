"""Several runs beside each other: what came of each, what their recipes differ in, and their curves in one figure."""

from collections.abc import Mapping
from typing import Any

from glora_llm import recipe as recipes
from glora_llm.report import page_figures as figures
from glora_llm.report.page_blocks import Part, Picture, Table, duration, gigabytes, number, score
from glora_llm.report.page_run import main_score, method_in_words, steps_in_words
from glora_llm.report.page_svg import inline_svg
from glora_llm.report.run_record import RunRecord
from glora_llm.report.summary import score_columns
from glora_llm.schema.scores import SCORES

NAMES_OF_A_RUN = {"output.dir"}  # they differ in every run


def runs_part(runs: Mapping[str, RunRecord]) -> Part:
    """Return the part that compares runs.

    Args:
        runs: title -> run.
    """
    part = Part("Comparison of the runs", "runs", f"{len(runs)} runs: {', '.join(runs)}.")
    part.add("Results", _results(runs))
    part.add("Settings that differ", _differing(runs))
    part.add("Curves", *_curves(runs))
    return part


def _results(runs: Mapping[str, RunRecord]) -> Table:
    """Return the results, a column for each run: runs are few, and a page is narrow."""
    finals = [_final(run) for run in runs.values()]
    names = dict.fromkeys(name for final in finals for name in final)
    every = list(runs.values())
    titles = {name: f"{name}\N{NO-BREAK SPACE}{_arrow(name)}".strip() for name in names}
    rows = [
        ["method", *(method_in_words(run) for run in every)],
        ["trained", *(steps_in_words(run) for run in every)],
        *([title, *(score(one.get(name)) for one in finals)] for name, title in titles.items()),
        ["trained parameters", *(number(run.summary.get("trained_parameters")) for run in every)],
        ["time", *(duration(run.summary.get("seconds")) for run in every)],
        ["peak memory", *(gigabytes(run.summary.get("peak_memory_gb")) for run in every)],
    ]
    where = sorted({found[0] for run in every if (found := main_score(run))})
    note = f"Scores of the {' or '.join(where)} rows. ↑: higher is better, ↓: lower." if where else ""
    return Table("Results", ["", *runs], rows, note)


def _final(run: RunRecord) -> dict[str, Any]:
    """Return the scores of the test, or of the validation where nothing was tested."""
    columns = score_columns(run.summary)
    return columns.get("test after") or columns.get("validation") or {}


def _arrow(name: str) -> str:
    found = SCORES.get(name)
    return "" if found is None else "↑" if found.higher else "↓"


def _differing(runs: Mapping[str, RunRecord]) -> Table | None:
    settings = [recipes.flat(run.recipe) for run in runs.values()]
    keys = [
        key
        for key in dict.fromkeys(key for values in settings for key in values)
        if key not in NAMES_OF_A_RUN and any(values.get(key) != settings[0].get(key) for values in settings)
    ]
    if not keys:
        return None
    rows = [[key, *(_value(values, key) for values in settings)] for key in keys]
    return Table("Keys of the recipes whose values differ", ["key", *runs], rows)


def _value(values: Mapping[str, Any], key: str) -> str:
    found = values.get(key)
    return "–" if found is None else recipes.value_text(found)


def _curves(runs: Mapping[str, RunRecord]) -> list[Picture]:
    pictures = []
    by_step = {title: (run.series.get("train/loss"), run.series.get("validation/loss")) for title, run in runs.items()}
    losses = [one for pair in by_step.values() for one in pair if one is not None]
    if losses:
        told = f"Lines: in training; points: on validation rows. {figures.rule(losses, True)}".strip()
        drawn = figures.together(by_step, "Loss (nats)")
        pictures.append(Picture(inline_svg(drawn, "Loss of the runs by step", "runs-loss"), f"Loss by step. {told}"))
    by_time = {title: (run.by_time("train/loss"), run.by_time("validation/loss")) for title, run in runs.items()}
    if losses and all(train is not None for train, _ in by_time.values()):
        drawn = figures.together(by_time, "Loss (nats)", "Time of training steps (s)")
        title = "Loss of the runs by time"
        pictures.append(Picture(inline_svg(drawn, title, "runs-time"), "Loss by time of training steps."))
    found = next((found for run in runs.values() if (found := main_score(run))), None)
    if found and found[1].rpartition("/")[2] != "loss":
        name = found[1]
        scored = {title: run.series[f"validation/{name}"] for title, run in runs.items() if _has(run, name)}
        if len(scored) > 1:
            drawn = figures.together({title: (None, one) for title, one in scored.items()}, name.replace("_", " "))
            title = f"{name} of the validation by step"
            told = figures.rule([*scored.values()])
            pictures.append(Picture(inline_svg(drawn, title, "runs-score"), f"{title}. {told}".strip()))
    return pictures


def _has(run: RunRecord, name: str) -> bool:
    return len(run.series[f"validation/{name}"].steps) > 1 if f"validation/{name}" in run.series else False
