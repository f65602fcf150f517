"""A trial: one run of a method at one learning rate and seed, in a folder that is named after its recipe."""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from glora_llm import recipe as recipes
from glora_llm.plan.run_folder import RunFolder
from glora_llm.schema import Recipe

# what is done with a run, and where it lies, makes no other trial of it
NOT_OF_THE_RUN = {"description", "output", "merge", "evaluation", "search"}
LONGEST_NAME = 120  # of a method in the name of a folder; what is cut off is in the digest
WARM_UP = 2  # first steps of a launch that say nothing about its speed


@dataclass(frozen=True)
class Trial:
    """One run.

    Args:
        method: as in --methods.
        lr: learning rate.
        seed: training.seed.
        steps: of the whole run.
        adapter: the adapter section, as plain values.
        root: the folder of all trials.
        overrides: what else differs from the comparison's recipe.
    """

    method: str
    lr: float
    seed: int
    steps: int
    adapter: dict[str, Any]
    root: Path
    overrides: tuple[str, ...] = field(default=())

    def settings(self) -> list[str]:
        """Return the overrides that make the comparison's recipe this trial's, without those of the launch."""
        own = {
            "adapter": self.adapter, "training.lr": self.lr, "training.seed": self.seed, "training.steps": self.steps,
            "training.epochs": None, "search": None, "merge.after_training": False, "evaluation.test_before": False,
        }  # fmt: skip
        return [*(f"{key}={recipes.value_text(value)}" for key, value in own.items()), *self.overrides]

    def name(self, recipe: Recipe) -> str:
        """Return the name of the run folder: method, rate, seed, and a digest of all that the run is bound to.

        Args:
            recipe: of this trial.
        """
        bound = recipe.model_dump(mode="json", exclude_defaults=True, exclude=NOT_OF_THE_RUN)
        digest = hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()[:8]
        method = self.method.replace(":", "-")[:LONGEST_NAME]
        return f"{method}-lr{self.lr:g}-seed{self.seed}-{digest}"


@dataclass(frozen=True)
class Result:
    """The scores and state of a trial, read from its run folder.

    Attributes:
        folder: of the run.
        summary: summary.json.
        lines: of metrics.jsonl, in order.
    """

    folder: Path
    summary: dict[str, Any]
    lines: list[dict[str, Any]]

    @classmethod
    def of(cls, folder: Path) -> "Result":
        """Read a run folder, which need not be there."""
        file = folder / "metrics.jsonl"
        lines = []
        for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            try:
                lines.append(json.loads(text))
            except ValueError:  # the last line of a run that was killed
                continue
        summary = RunFolder(folder).summary() if folder.is_dir() else {}
        return cls(folder, summary, [line for line in lines if isinstance(line, dict) and "step" in line])

    def has_ended(self, steps: int, tested: bool) -> bool:
        """Tell whether all steps were trained and scored, on the test rows too if `tested`."""
        return self.summary.get("steps") == steps and (not tested or "test" in self.summary)

    def validation(self, score: str, step: int) -> float | None:
        """Return a validation score after `step` steps, or None where there is none (yet)."""
        name = f"validation/{score}"
        return next((line[name] for line in reversed(self.lines) if line["step"] == step and name in line), None)

    def validations(self, score: str) -> dict[int, float]:
        """Return step -> validation score."""
        name = f"validation/{score}"
        return {line["step"]: line[name] for line in self.lines if name in line}

    def series(self, name: str) -> list[float]:
        """Return the values of a metric of the steps, in order."""
        return [line[name] for line in self.lines if name in line]

    def trained(self) -> int:
        """Return the steps that were trained."""
        return max((line["step"] for line in self.lines), default=0)

    def selection_steps(self) -> int:
        """Return the steps that as many samples make as the structure was chosen by: each went forward and backward."""
        file = self.folder / "structure" / "choice.json"
        samples: int = json.loads(file.read_text(encoding="utf-8")).get("samples", 0) if file.is_file() else 0
        return math.ceil(samples / RunFolder(self.folder).recipe().training.global_batch) if samples else 0

    def seconds(self) -> float:
        """Return the seconds of all training steps; where not every step is logged, from those that are."""
        each = self.series("train/seconds_per_step")
        return mean(each) * max(line["step"] for line in self.lines) if each else 0.0

    def tokens_per_second(self) -> float | None:
        """Return what the steps after the first two took in, in tokens (or patches) a second; None where none did."""
        names = ("train/tokens_per_second", "train/patches_per_second")
        rates = next((found for name in names if (found := self.series(name))), [])
        seconds = self.series("train/seconds_per_step")
        chosen = list(zip(rates, seconds, strict=True))[WARM_UP:] or list(zip(rates, seconds, strict=True))
        total = sum(second for _, second in chosen)
        return sum(rate * second for rate, second in chosen) / total if total else None

    def peak_gb(self) -> float | None:
        """Return the most memory of all steps, GB."""
        return max(self.series("train/peak_memory_gb"), default=None)

    def test(self, score: str) -> float | None:
        """Return a test score; of several named test sets their mean; None where there is none."""
        found = self.summary.get("test") or {}
        named = [value for name, value in found.items() if name.endswith(f"/{score}")]
        return found.get(f"test/{score}", mean(named) if named else None)

    def forgetting(self) -> float | None:
        """Return how much the loss on the other text has risen, nats a token."""
        found = self.summary.get("forgetting", {})
        return found["after"] - found["before"] if {"before", "after"} <= found.keys() else None
