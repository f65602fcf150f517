"""The course of one method: its rates on the first seed with successive halving, then all seeds at the best rate."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from glora_llm import recipe as recipes
from glora_llm.compare.outcome import NotRun, Outcome, rate_text
from glora_llm.compare.pool import Pool, in_parallel
from glora_llm.compare.progress import Progress
from glora_llm.compare.record import RECIPE, Record
from glora_llm.compare.trial import Result, Trial
from glora_llm.errors import UserError
from glora_llm.launch.stop import EXIT_CODE
from glora_llm.schema.scores import score_of

OF_ANSWERS = ("number_match",)  # scores of generated answers, which validations do not have
KEPT = 0.5  # share of the rates that goes on at each halving
BAD_INPUT = 2  # exit code of a UserError
SPEED_STEPS = 12  # of the launch that measures a method's speed


@dataclass(frozen=True)
class Setting:
    """The settings that all trials of a comparison share.

    Args:
        out: the folder of the comparison.
        score: of the test rows, that decides.
        every: steps between two validations.
        seeds: values of training.seed, the first one chooses the rate.
        forgetting: text whose loss is measured before and after; None: none.
        save_every: steps between two checkpoints.
    """

    out: Path
    score: str
    every: int
    seeds: tuple[int, ...]
    forgetting: str | None
    save_every: int

    def rung(self, steps: int) -> int:
        """Return the step at which half of the rates is left: the last validation in the first third of the run."""
        return max(self.every, steps // 3 // self.every * self.every)

    @property
    def choice(self) -> str:
        """The score of validation rows that chooses the rate: the same, or the loss where answers are generated."""
        name = self.score.rpartition("/")[2]
        return "loss" if name in OF_ANSWERS else name

    def better(self, value: float, score: str) -> float:
        """Return a number that is smaller for a better score; a loss that is not finite is worst."""
        return (-value if score_of(score).higher else value) if math.isfinite(value) else math.inf


class Course:
    """Runs the trials of one method; several courses run beside each other in threads.

    Args:
        setting: of the comparison.
        make: (rate, seed) -> trial.
        record, pool, progress: of the comparison.
    """

    def __init__(
        self, setting: Setting, make: Callable[[float, int], Trial], record: Record, pool: Pool, progress: Progress
    ):
        self.setting, self.make, self.record, self.pool, self.progress = setting, make, record, pool, progress

    def run(self, rates: Sequence[float]) -> Outcome:
        """Find the best rate and run it on all seeds.

        Raises:
            NotRun: when every rate diverges, or a trial fails.
            Ending: when the comparison is told to end.
        """
        found, seed = Outcome(), self.setting.seeds[0]
        if len(rates) == 1:  # nothing to choose
            found.lr = rates[0]
        else:
            self._choose([self.make(lr, seed) for lr in sorted(rates)], found)
        return self.test(found)

    def test(self, found: Outcome) -> Outcome:
        """Run all seeds at the best rate and score their test rows.

        Raises:
            NotRun: when a seed diverges, or a trial fails.
        """
        tried = [*found.rates, *found.stopped]
        found.is_at_edge = len(tried) > 1 and found.lr in (min(tried), max(tried))
        finals = [self.make(found.lr, each) for each in self.setting.seeds]
        results = in_parallel(lambda trial: self.launch(trial, None, is_final=True), finals)
        found.finals = [result for result in results if result is not None]
        if len(found.finals) < len(results):
            raise NotRun(f"it diverged at rate {rate_text(found.lr)}")
        if any(result.test(self.setting.score) is None for result in found.finals):
            raise NotRun(f"its test rows have no score {self.setting.score}")
        found.stopped.pop(found.lr, None)
        score = found.finals[0].validation(self.setting.choice, finals[0].steps)
        found.rates |= {} if score is None else {found.lr: score}
        return found

    def _choose(self, trials: list[Trial], found: Outcome) -> None:
        """Find the best rate on the first seed, where need be one step of the grid beyond it.

        Raises:
            NotRun: when every rate diverges.
        """
        self.finish(self._halve(trials, found), found)
        beyond = found.beyond()
        if beyond is not None:
            self.finish([self.make(beyond, trials[0].seed)], found)

    def _halve(self, trials: list[Trial], found: Outcome) -> list[Trial]:
        """Run the first third of each trial, and return the better half."""
        rung = self.setting.rung(trials[0].steps)
        return trials if len(trials) < 3 or rung >= trials[0].steps else self.reach(trials, rung, found)

    def reach(self, trials: list[Trial], rung: int, found: Outcome) -> list[Trial]:
        """Run trials up to a step, note their scores there, and return the better half of those that do not diverge.

        Raises:
            NotRun: when every one diverges.
        """
        results = in_parallel(lambda trial: self.launch(trial, rung), trials)
        scores = {}
        for trial, result in zip(trials, results, strict=True):
            score = None if result is None else result.validation(self.setting.choice, rung)
            found.stopped[trial.lr] = score
            if score is not None:
                scores[trial.lr] = self.setting.better(score, self.setting.choice)
        if not scores:
            raise NotRun(found.diverged())
        kept = sorted(scores, key=lambda lr: (scores[lr], lr))[: math.ceil(KEPT * len(trials))]
        found.lr = kept[0]
        return [trial for trial in trials if trial.lr in kept]

    def finish(self, trials: list[Trial], found: Outcome) -> None:
        """Run trials to their end, and note their scores and the best rate.

        Raises:
            NotRun: when every one diverges.
        """
        for trial, result in zip(trials, in_parallel(lambda trial: self.launch(trial, None), trials), strict=True):
            score = None if result is None else result.validation(self.setting.choice, trial.steps)
            if score is None:
                found.stopped[trial.lr] = None
            else:
                found.rates[trial.lr] = score
                found.stopped.pop(trial.lr, None)
        if not found.rates:
            raise NotRun(found.diverged())
        found.lr = min(found.rates, key=lambda lr: (self.setting.better(found.rates[lr], self.setting.choice), lr))

    def seconds_per_step(self, trial: Trial) -> float:
        """Return the measured seconds of a step: the mean of the steps after the first two of a short launch."""
        result = self.launch(trial, SPEED_STEPS)
        seconds = result.series("train/seconds_per_step")[2:] if result else []
        if not seconds:
            raise NotRun("its speed could not be measured: it diverged within the first steps")
        return sum(seconds) / len(seconds)

    def launch(self, trial: Trial, until: int | None, is_final: bool = False) -> Result | None:
        """Run a trial up to step `until`, or to its end; what is done already is not done again. None: it diverged.

        Args:
            is_final: score the test rows at the end.

        Raises:
            NotRun: when the trial fails.
        """
        recipe_file = self.setting.out / RECIPE
        name = trial.name(recipes.load(str(recipe_file), trial.settings()))
        if self.record.trials.get(name, {}).get("status") == "diverged":
            return None
        result = Result.of(trial.root / name)
        if not self._is_done(result, trial, until, is_final):
            return self._train(trial, name, until, is_final)
        self.progress.reuse(name, until or trial.steps)
        self._note(name, trial, result, "ended" if result.has_ended(trial.steps, tested=False) else "stopped")
        return result

    def _train(self, trial: Trial, name: str, until: int | None, is_final: bool) -> Result | None:
        """Start a trial, wait for it, and note what came of it."""
        folder, log = trial.root / name, trial.root / f"{name}.log"
        start = Result.of(folder).trained()
        log_start = log.stat().st_size if log.is_file() else 0
        of_launch = self._of_launch(folder, until, is_final)
        command = ["train", "--recipe", str(self.setting.out / RECIPE), *trial.settings(), *of_launch]
        code, seconds = self.pool.run(command, folder, log, partial(self.progress.begin, name))
        result = Result.of(folder)
        said = log.read_bytes()[log_start:].decode("utf-8", "replace")
        status = self._status(code, said, result, trial, until, is_final)
        earlier = self.record.trials.get(name, {}).get("wall_seconds", 0.0)
        self._note(name, trial, result, status, wall_seconds=seconds + earlier)
        self.progress.end(name, (start, until or trial.steps), seconds, self._shown(result, status))
        if status == "failed":
            why = f"trial {name} ended with exit code {code}: {_last_words(said)} ({log})"
            raise NotRun(why, is_defect=code != BAD_INPUT)
        self._require_score(result)
        return None if status == "diverged" else result

    def _require_score(self, result: Result) -> None:
        """Check that the task reports the score that decides.

        Raises:
            UserError: with the scores that it reports.
        """
        names = {name.partition("/")[2] for line in result.lines for name in line if name.startswith("validation/")}
        if names and self.setting.choice not in names:
            raise UserError(f"--score {self.setting.score} is none of this task's scores: {', '.join(sorted(names))}.")

    def _is_done(self, result: Result, trial: Trial, until: int | None, is_final: bool) -> bool:
        if until is not None and until % self.setting.every == 0:  # a validation is due then
            return result.validation(self.setting.choice, until) is not None
        if until is not None:
            return any(line["step"] >= until for line in result.lines)
        return result.has_ended(trial.steps, is_final)

    def _of_launch(self, folder: Path, until: int | None, is_final: bool) -> list[str]:
        """Return the settings that belong to a launch alone."""
        setting, is_full = self.setting, folder.name.startswith("full-")
        text = setting.forgetting if is_final or is_full else None  # of a whole model the loss before is needed
        values = {
            "output.dir": str(folder), "output.keep": 1, "output.save_every": setting.save_every,
            "output.stop_after": until, "output.max_hours": None, "evaluation.every": setting.every,
            "evaluation.patience": None, "evaluation.keep_best": False,
            "evaluation.test": is_final, "evaluation.row_scores": True, "evaluation.forgetting": text,
        }  # fmt: skip
        return [f"{key}={recipes.value_text(value)}" for key, value in values.items()]

    def _status(self, code: int, said: str, result: Result, trial: Trial, until: int | None, is_final: bool) -> str:
        if code in (0, EXIT_CODE) and self._is_done(result, trial, until, is_final):
            return "ended" if until is None else "stopped"
        return "diverged" if code == 1 and "check failed:" in said else "failed"

    def _note(self, name: str, trial: Trial, result: Result, status: str, **more: float) -> None:
        values = {
            "method": trial.method, "lr": trial.lr, "seed": trial.seed, "steps": trial.steps, "status": status,
            "folder": str(Path("trials") / name), "validation": result.validations(self.setting.choice),
            "test": result.summary.get("test"), "trained": result.trained(),
            "selection_steps": result.selection_steps(),
        }  # fmt: skip
        self.record.note(name, **values, **more)

    def _shown(self, result: Result, status: str) -> str:
        scores = result.validations(self.setting.choice)
        last = f"validation {self.setting.choice} {scores[max(scores)]:.4f} at step {max(scores)}" if scores else ""
        return ", ".join(part for part in (status, last) if part)


def _last_words(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1].removeprefix("error: ")
