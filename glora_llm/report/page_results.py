"""Parts of a run's page that other commands leave behind: benchmarks, a search, samples and a merge."""

import math
from typing import Any, NamedTuple

import numpy as np

from glora_llm.report.page_blocks import Picture, Sample, Samples, Table, Text, number, score
from glora_llm.report.page_svg import inline_svg
from glora_llm.report.run_record import RunRecord
from glora_llm.report.search_figures import pareto
from glora_llm.search.limits import limits

SHOWN, LONGEST = 8, 1500  # samples, and characters of each part of one
DOTS = 1500  # candidates of a search that are drawn; of more, so many are chosen by a fixed seed
STDERR = "_stderr"
TOLD = (("weights", "weights:"), ("limit", "at most the first questions of each task:"), ("date", "on"))
MERGE_ROWS = (
    ("max_abs_logit_diff", "largest difference of a logit"),
    ("top1_agreement", "share of tokens with the same most likely next token"),
    ("loss_before", "loss of the unmerged model (nats/token)"),
    ("loss_after", "loss of the merged model (nats/token)"),
    ("tokens", "tokens compared"),
)


class Candidate(NamedTuple):
    """A structure that a search scored; see `search.archive.Scored`."""

    score: float
    parameters: int
    generation: int


def evaluation_tables(run: RunRecord) -> list[Table]:
    """Return a table for each file of RUN/eval: the benchmarks of lm-eval with their standard errors."""
    tables = []
    for name, found in run.evaluations.items():
        rows = [
            [
                task, metric, score(value), score(values.get(f"{metric}{STDERR}")), _of(found.get("num_fewshot"), task),
                _of(found.get("questions"), task),
            ]
            for task, values in (found.get("tasks") or {}).items()
            if isinstance(values, dict)
            for metric, value in values.items()
            if not metric.endswith(STDERR) and isinstance(value, int | float)
        ]  # fmt: skip
        if rows:
            head = ["task", "metric", "value", "standard error", "few-shot", "questions"]
            tables.append(Table(f"Benchmarks by lm-eval ({name})", head, rows, _told(found)))
    return tables


def _of(values: Any, task: str) -> str:
    """Return the value of a task, where each has its own."""
    return number(values.get(task) if isinstance(values, dict) else values)


def _told(found: dict[str, Any]) -> str:
    parts = [f"{words} {found[key]}" for key, words in TOLD if found.get(key) is not None]
    versions = found.get("versions")
    if isinstance(versions, dict):
        parts.append("versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    return "; ".join(parts)


def search_table(run: RunRecord) -> Table | None:
    """Return what a search found for each of its limits."""
    found = run.summary.get("search")
    if not isinstance(found, dict) or not found:
        return None
    tests = list(dict.fromkeys(name for one in found.values() for name in one.get("test") or ()))
    rows = [
        [limit, number(one.get("parameters")), score(one.get("score")),
         *(score((one.get("test") or {}).get(name)) for name in tests), number(one.get("candidates")),
         number(one.get("passes")), number(one.get("seconds"))]
        for limit, one in found.items()
    ]  # fmt: skip
    head = ["limit", "parameters", "score", *tests, "candidates", "passes", "seconds"]
    note = "The first limit's structure is RUN/genome.json. Higher scores are better. A pass is one over all rows."
    return Table("What the search chose", head, rows, note)


def frontier(run: RunRecord, name: str) -> Picture | None:
    """Return the figure of score against size of every candidate of a search, with its Pareto front."""
    entries = [entry for entry in run.archive.get("candidates") or () if _is_scored(entry)]
    if not entries or run.recipe.search is None:
        return None
    rest = [entry for entry in entries if not entry["pareto"]]
    told = ""
    if len(rest) > DOTS:
        chosen = np.random.default_rng(0).choice(len(rest), DOTS, replace=False)
        told = f" Of {len(rest):,} candidates off the front, {DOTS:,} are drawn, chosen at random."
        rest = [rest[place] for place in sorted(chosen)]
    front = [_candidate(entry) for entry in entries if entry["pareto"]]
    allowed = list(limits(run.recipe.search).items()) if run.recipe.search.limit == "parameters" else []
    figure = pareto([_candidate(entry) for entry in rest] + front, front, allowed, run.recipe.search.metric)  # type: ignore[arg-type]
    figure.set_size_inches(4.9, 3.9)
    figure.suptitle("")
    caption = f"Every candidate of the search: score against size. Its front: none is both smaller and better.{told}"
    return Picture(inline_svg(figure, "Score against size of the candidates", f"{name}-frontier"), caption, paper=True)


def _is_scored(entry: Any) -> bool:
    """Tell whether an entry of the archive has all that is drawn of it."""
    wanted = ("score", "parameters", "generation", "pareto")
    return isinstance(entry, dict) and all(
        isinstance(entry.get(key), int | float) and math.isfinite(entry[key]) for key in wanted
    )


def _candidate(entry: dict[str, Any]) -> Candidate:
    return Candidate(entry["score"], entry["parameters"], entry["generation"])


def samples(run: RunRecord) -> Samples | None:
    """Return prompts with the answers before and after training; None where the run wrote none."""
    if not run.samples:
        return None
    names = ("prompt", "reference", "before", "after")
    found = [
        Sample(
            f"Sample {place}{_split(entry)}",
            [(name, _cut(entry[name])) for name in names if entry.get(name) is not None],
        )
        for place, entry in enumerate(run.samples[:SHOWN], 1)
    ]
    total = len(run.samples)
    return Samples(found, f"{SHOWN} of {total:,} are shown." if total > SHOWN else "")


def _split(entry: dict[str, Any]) -> str:
    return f" ({entry['split']})" if entry.get("split") else ""


def _cut(text: Any) -> str:
    whole = text if isinstance(text, str) else str(text)
    more = len(whole) - LONGEST
    return f"{whole[:LONGEST]} ... ({more:,} characters more)" if more > 0 else whole


def merge_blocks(run: RunRecord) -> list[Any]:
    """Return how exactly the merged model answers as the unmerged one, from RUN/merged/merge_report.json."""
    report, bounds = run.merge, run.recipe.merge
    if not report:
        return []
    if report.get("compared") is False:
        return [Text("RUN/merged was written without comparing it with the unmerged model (--no-compare).", True)]
    parts = {"merged": report} | {
        title: report[key]
        for key, title in (("requantised", "requantised"), ("int8", "int8"), ("int8_exported", "int8, exported"))
        if isinstance(report.get(key), dict)
    }
    rows = [[words, *(number(one.get(key)) for one in parts.values())] for key, words in MERGE_ROWS if key in report]
    note = (
        f"Compared on {report.get('text', 'text')}. The recipe's bounds: agreement of at least "
        f"{bounds.min_top1_agreement:g}, a change of the loss of at most {bounds.max_loss_change:g}."
    )
    blocks: list[Any] = [Table("The merged model against the unmerged one", ["", *parts], rows, note)]
    speed = report.get("latency")
    if isinstance(speed, dict):
        cells = [
            ["merged", number(speed.get("merged_tokens_per_second"))],
            ["base model", number(speed.get("base_tokens_per_second"))],
            ["ratio", number(speed.get("ratio"))],
        ]
        blocks.append(
            Table("Speed of the merged model", ["", "tokens per second"], cells, str(speed.get("measured", "")))
        )
    return blocks
