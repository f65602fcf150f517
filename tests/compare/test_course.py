"""The course of a method: halving, the edge of the grid, all seeds at the best rate; of a learner that is made up."""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from glora_llm import recipe as recipes
from glora_llm.compare.course import Course, Setting
from glora_llm.compare.outcome import NotRun, Outcome, rate_text
from glora_llm.compare.pool import Pool
from glora_llm.compare.progress import Progress
from glora_llm.compare.record import RECIPE, Record
from glora_llm.compare.trial import Trial
from glora_llm.errors import UserError

STEPS, EVERY = 12, 2
Loss = Callable[[float, int, int], float]  # rate, seed, step -> validation loss


class MadeUp(Pool):
    """Writes what a run writes, with made-up losses; a loss that is not a number ends it as a diverged one."""

    def __init__(self, loss: Loss):
        super().__init__([{}, {}])
        self.loss, self.launched = loss, []  # type: tuple[Loss, list[tuple[float, int, int, bool]]]

    def run(self, arguments: Sequence[str], folder: Path, log: Path, begin: Callable[[], None]) -> tuple[int, float]:
        given = recipes.load(arguments[2], list(arguments[3:]))
        training, evaluation, until = given.training, given.evaluation, given.output.stop_after or STEPS
        self.launched.append((training.peak_lr, training.seed, until, evaluation.test))
        folder.mkdir(parents=True, exist_ok=True)
        speed = {"train/tokens_per_second": 9.0, "train/seconds_per_step": 0.5}
        lines = [{"step": step, "train/loss": 1.0, **speed} for step in range(1, until + 1)]
        for line in lines:
            if line["step"] % EVERY == 0:
                line["validation/loss"] = self.loss(training.peak_lr, training.seed, int(line["step"]))
        log.write_text("")
        if any(math.isnan(value) for line in lines for value in line.values()):
            log.write_text("check failed: 5 steps in a row had a loss that is not finite\n")
            return 1, 1.0
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if until < STEPS:
            return 75, 1.0
        test = {"test": {"test/loss": lines[-1]["validation/loss"]}} if evaluation.test else {}
        (folder / "summary.json").write_text(json.dumps({"steps": STEPS, "validation": {}} | test))
        return 0, 1.0


def made(out: Path, loss: Loss, seeds: tuple[int, ...] = (0, 1), score: str = "loss") -> tuple[Course, MadeUp]:
    out.mkdir(exist_ok=True)
    (out / RECIPE).write_text(recipes.dump(recipes.load("tiny_cpu")))
    setting = Setting(out, score, EVERY, seeds, None, 100)
    make = partial(Trial, "lora", steps=STEPS, adapter={"method": "lora"}, root=out / "trials")
    (out / "trials").mkdir(exist_ok=True)
    pool = MadeUp(loss)
    record = Record(out, {"budget": "any"})
    return Course(setting, lambda lr, seed: make(lr=lr, seed=seed), record, pool, Progress(100, 2)), pool


def bowl(best: float) -> Loss:
    """The loss falls with the steps, and is lowest at one rate."""
    return lambda lr, seed, step: abs(math.log(lr / best)) + 1 / step + 0.01 * seed


def run(out: Path, loss: Loss, rates: Sequence[float]) -> tuple[Outcome, list[tuple[float, int, int, bool]]]:
    course, pool = made(out, loss)
    return course.run(rates), pool.launched


def test_the_better_half_goes_on_and_the_best_is_tested_on_all_seeds(tmp_path: Path) -> None:
    found, launched = run(tmp_path, bowl(2e-3), [1e-2, 5e-4, 1e-3, 2e-3, 5e-3])
    third = {(lr, 0, 4, False) for lr in (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)}
    ends = {(lr, 0, STEPS, False) for lr in (1e-3, 2e-3, 5e-3)}
    assert set(launched) == third | ends | {(2e-3, seed, STEPS, True) for seed in (0, 1)}
    assert len(launched) == 5 + 3 + 2, "nothing runs twice"
    assert (found.lr, found.is_at_edge, len(found.finals)) == (2e-3, False, 2)
    assert set(found.rates) == {1e-3, 2e-3, 5e-3} and set(found.stopped) == {5e-4, 1e-2}
    assert found.stopped[1e-2] == pytest.approx(math.log(5) + 0.25), "the score where it was stopped"


def test_the_same_again_launches_nothing_and_finds_the_same(tmp_path: Path) -> None:
    first, _ = run(tmp_path, bowl(2e-3), [5e-4, 1e-3, 2e-3, 5e-3])
    again, launched = run(tmp_path, bowl(2e-3), [5e-4, 1e-3, 2e-3, 5e-3])
    assert launched == [] and again == first


def test_a_best_rate_at_the_edge_is_looked_beyond_once(tmp_path: Path) -> None:
    found, launched = run(tmp_path / "a", bowl(1.9e-2), [5e-3, 1e-2])
    assert (2e-2, 0, STEPS, False) in launched and (found.lr, found.is_at_edge) == (2e-2, True)
    found, _ = run(tmp_path / "b", bowl(9e-3), [5e-3, 1e-2])
    assert (found.lr, found.is_at_edge) == (1e-2, False) and set(found.rates) == {5e-3, 1e-2, 2e-2}
    found, launched = run(tmp_path / "c", bowl(1e-5), [1e-3, 2e-3])
    assert (found.lr, found.is_at_edge) == (5e-4, True), "downwards too, and only once"


def test_a_single_rate_is_not_chosen(tmp_path: Path) -> None:
    found, launched = run(tmp_path, bowl(1e-3), [1e-3])
    assert sorted(launched) == [(1e-3, 0, STEPS, True), (1e-3, 1, STEPS, True)] and not found.is_at_edge
    assert found.rates == {1e-3: pytest.approx(1 / STEPS)}


def test_a_rate_that_diverges_is_left_out_and_not_tried_again(tmp_path: Path) -> None:
    def loss(lr: float, seed: int, step: int) -> float:
        return math.nan if lr > 4e-3 else bowl(2e-3)(lr, seed, step)

    rates = [1e-3, 2e-3, 5e-3, 1e-2]
    found, _ = run(tmp_path, loss, rates)
    assert found.lr == 2e-3 and found.stopped == {5e-3: None, 1e-2: None}
    again, launched = run(tmp_path, loss, rates)
    assert launched == [] and again == found
    with pytest.raises(NotRun, match=r"diverged at every rate that was tried: 1e-2, 2e-2"):
        run(tmp_path, loss, [1e-2, 2e-2])


def test_a_score_that_the_task_has_not_is_an_error(tmp_path: Path) -> None:
    course, _ = made(tmp_path, bowl(1e-3), score="accuracy")
    with pytest.raises(UserError, match="--score accuracy is none of this task's scores: loss"):
        course.run([1e-3])


def test_a_changed_recipe_is_another_trial(tmp_path: Path) -> None:
    adapter = {"method": "lora", "targets": "all-linear", "rank": 2, "alpha": 4.0}
    trial = Trial("glora:hira", 2e-3, 1, STEPS, adapter, tmp_path)
    name = trial.name(recipes.load("tiny_cpu", trial.settings()))
    assert name.startswith("glora-hira-lr0.002-seed1-")
    same = recipes.load("tiny_cpu", [*trial.settings(), "output.keep=7", "evaluation.test=false"])
    other = recipes.load("tiny_cpu", [*trial.settings(), "data.max_rows=100"])
    assert trial.name(same) == name != trial.name(other)


def test_rates_are_written_short() -> None:
    assert [rate_text(lr) for lr in (1e-3, 2.5e-4, 0.02, 1.0, 1.5e-10)] == ["1e-3", "2.5e-4", "2e-2", "1e0", "1.5e-10"]


def test_a_kill_between_the_last_step_and_its_validation_is_seen(tmp_path: Path) -> None:
    rates = [5e-4, 1e-3, 2e-3]
    first, launched = run(tmp_path, bowl(1e-3), rates)
    stopped = next((tmp_path / "trials").glob("lora-lr0.002-*/metrics.jsonl"))
    assert (2e-3, 0, STEPS, False) not in launched, "its first third is all there is"
    lines = [json.loads(line) for line in stopped.read_text().splitlines()]
    del lines[-1]["validation/loss"]
    stopped.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again, launched = run(tmp_path, bowl(1e-3), rates)
    assert launched == [(2e-3, 0, 4, False)] and again.lr == first.lr and again.rates == first.rates


def test_generated_answers_are_judged_and_the_loss_chooses(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "number_match", EVERY, (0,), None, 100)
    assert setting.choice == "loss" and setting.better(0.9, "number_match") < setting.better(0.1, "number_match")
    assert Setting(tmp_path, "sketch/accuracy", EVERY, (0,), None, 100).choice == "accuracy"
    assert setting.rung(75) == 24 and Setting(tmp_path, "loss", 12, (0,), None, 100).rung(75) == 24
