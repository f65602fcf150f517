"""The validation that was best so far: what is kept by it, and when training ends for lack of a better one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glora_llm.schema import EvaluationSection
from glora_llm.schema.scores import score_of


@dataclass
class Best:
    """The best validation of a run. It depends on the scores alone, so a run that goes on decides as one left alone.

    Every checkpoint holds `state_dict()`; what is best is thus known from what is on the disk.

    Attributes:
        name: of the score, as it is logged: `validation/loss`.
        higher: more is better.
        keeps: the best checkpoint is kept, and is what is deployed.
        patience: validations without a better score after which training ends; None: it does not.
        score: the best one; None before the first that is finite.
        step: after which it was measured; 0 before.
        waited: validations since then.
        seen: step of the last validation.
        kept: step of the best checkpoint that was really written, as the main process knows it; 0: none.
    """

    name: str
    higher: bool
    keeps: bool
    patience: int | None
    score: float | None = None
    step: int = 0
    waited: int = 0
    seen: int = 0
    kept: int = 0

    @classmethod
    def of(cls, section: EvaluationSection) -> "Best":
        """Return what a recipe asks for, before any validation."""
        name = watched_score(section)
        return cls(f"validation/{name}", score_of(name).higher, bool(section.keep_best), section.patience)

    @property
    def watches(self) -> bool:
        """True where anything goes by the best validation."""
        return self.keeps or self.patience is not None

    def see(self, step: int, score: float | None) -> bool:
        """Take in a validation, and tell whether it is the best so far; of equal ones the first is.

        Args:
            step: optimizer steps done.
            score: None or not finite: it is not better.
        """
        self.seen = step
        finite = score is not None and math.isfinite(score)
        if finite and (self.score is None or (score > self.score if self.higher else score < self.score)):  # type: ignore[operator]
            self.score, self.step, self.waited = score, step, 0
            return True
        self.waited += 1
        return False

    @property
    def is_over(self) -> bool:
        """True when training ends here, for lack of a better score."""
        return self.patience is not None and self.waited >= self.patience

    def reason(self) -> str:
        """Return in words why training ended early."""
        best = "none was finite" if self.score is None else f"the best, {self.score:.4f}, was after step {self.step}"
        return f"{self.name} was not better for {self.waited} validations (evaluation.patience): {best}"

    def written(self, step: int) -> None:
        """Take note that the checkpoint of a step is on the disk."""
        if step == self.step:
            self.kept = step

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return the state for the checkpoint of a step, which counts as written when it is read."""
        kept = step if step == self.step else self.kept
        values = {key: getattr(self, key) for key in ("name", "score", "step", "waited", "seen")}
        return values | {"kept": kept if self.keeps else 0}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Set the state that a checkpoint holds; of another score, or of none, the search begins anew."""
        if values.get("name") == self.name:
            for key in ("score", "step", "waited", "seen", "kept"):
                setattr(self, key, values[key])


def watched_score(section: EvaluationSection) -> str:
    """Return the score that keep_best and patience go by, without `validation/`: the loss where none is named."""
    return section.keep_best if isinstance(section.keep_best, str) else "loss"
