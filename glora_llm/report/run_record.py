"""Read a run folder for a report: without torch, without the model, and whether or not the run has ended."""

import contextlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glora_llm.errors import UserError
from glora_llm.files.json_file import read_object
from glora_llm.plan.run_folder import RunFolder
from glora_llm.schema import Recipe

METRICS = "metrics.jsonl"
DAMAGED = "Delete the file, or put a copy of it back: the report then is made without it, or with the copy."


@dataclass(frozen=True)
class Series:
    """Logged values of one name.

    Args:
        steps: optimizer steps done, rising; or seconds (`RunRecord.by_time`).
        values: not-a-number where what was logged is not finite.
    """

    steps: NDArray[Any]
    values: NDArray[np.float64]

    @property
    def finite(self) -> NDArray[np.float64]:
        """The values that are finite."""
        return self.values[np.isfinite(self.values)]


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it; what a run has not is empty.

    Args:
        folder: of the run.
        recipe: with every default.
        summary: summary.json.
        series: name -> what was logged under it.
        damaged: lines of metrics.jsonl that say no step.
        base: base.json.
        launches: launches.jsonl.
        failure: failure.json.
        merge: merge_report.json of RUN/merged.
        archive: of a search, search/archive.json.
        evaluations: file -> result of `glora-llm evaluate --tasks`, RUN/eval/*.json.
        samples: prompts with the answers before and after, samples.jsonl.
    """

    folder: RunFolder
    recipe: Recipe
    summary: dict[str, Any]
    series: dict[str, Series]
    damaged: int
    base: dict[str, Any]
    launches: list[dict[str, Any]]
    failure: dict[str, Any]
    merge: dict[str, Any]
    archive: dict[str, Any]
    evaluations: dict[str, dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def last_step(self) -> int:
        """The last step that was logged; 0: none was."""
        return max((int(series.steps[-1]) for series in self.series.values()), default=0)

    def by_time(self, name: str) -> Series | None:
        """Return a series over seconds of training in the place of steps; None where it or the time is missing."""
        each, wanted = self.series.get("train/seconds_per_step"), self.series.get(name)
        if each is None or wanted is None:
            return None
        passed = np.nancumsum(np.diff(each.steps, prepend=0) * each.values)
        return Series(np.interp(wanted.steps, each.steps, passed), wanted.values)

    @property
    def unit(self) -> str:
        """The unit of speed: `patches` of images, else `tokens`."""
        return "patches" if "train/patches_per_second" in self.series else "tokens"


def read_run(path: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        UserError: when it is no run folder, or a file that the report is about is damaged.
    """
    folder = RunFolder(path)
    recipe = folder.recipe()
    series, damaged = read_metrics(path / METRICS)
    return RunRecord(
        folder=folder,
        recipe=recipe,
        summary=folder.summary(),
        series=series,
        damaged=damaged,
        base=folder.base(),
        launches=folder.launches(),
        failure=_failure(path / "failure.json"),
        merge=_optional(path / "merged" / "merge_report.json"),
        archive=_optional(path / "search" / "archive.json"),
        evaluations={file.stem: _optional(file) for file in sorted((path / "eval").glob("*.json"))},
        samples=[entry for _, entry in _objects(path / "samples.jsonl") if entry and "prompt" in entry],
    )


def read_metrics(file: Path) -> tuple[dict[str, Series], int]:
    """Return name -> series of a metrics.jsonl, and how many of its lines say no step; nothing where it is missing.

    Raises:
        UserError: when it cannot be read.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    damaged = 0
    for _, entry in _objects(file):
        step = entry.get("step") if entry else None
        if entry is None or type(step) is not int:
            damaged += 1
            continue
        for name, value in entry.items():
            if name != "step" and (value is None or type(value) in (int, float)):
                found.setdefault(name, []).append((step, math.nan if value is None else float(value)))
    return {name: _series(pairs) for name, pairs in found.items()}, damaged


def _series(pairs: list[tuple[int, float]]) -> Series:
    if any(after[0] < before[0] for before, after in itertools.pairwise(pairs)):  # edited by hand
        pairs = sorted(pairs, key=lambda pair: pair[0])
    values = np.array([value for _, value in pairs])
    return Series(np.array([step for step, _ in pairs]), np.where(np.isfinite(values), values, np.nan))


def _objects(file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield (number, object) of every line that is not empty; None for a line that holds none."""
    if not file.exists():
        return
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}. {DAMAGED}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        entry = None
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
        yield number, entry if isinstance(entry, dict) else None


def _optional(file: Path) -> dict[str, Any]:
    return read_object(file, DAMAGED) if file.exists() else {}


def _failure(file: Path) -> dict[str, Any]:
    """Return what failure.json says; a process that dies while it writes it leaves a part."""
    try:
        return _optional(file)
    except UserError:
        return {"error": f"{file.name} cannot be read"}
