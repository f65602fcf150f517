"""Compare methods: bring them to equal cost, run their trials, and write the table. Read this first."""

import hashlib
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from glora_llm import recipe as recipes
from glora_llm.adapters.config import linear_suffixes
from glora_llm.adapters.methods import check_method
from glora_llm.adapters.targets import require_names
from glora_llm.atomic import write_text
from glora_llm.compare.budget import TOLERANCE, require_near, solve
from glora_llm.compare.contenders import WHOLE, Contender
from glora_llm.compare.course import Course, Setting
from glora_llm.compare.outcome import NotRun
from glora_llm.compare.pool import Pool, in_parallel, slots
from glora_llm.compare.progress import Progress
from glora_llm.compare.race import Race, Racer, planned, require_rungs
from glora_llm.compare.record import RECIPE, Record
from glora_llm.compare.request import AUTO, Request
from glora_llm.compare.table import Contest, print_table, rows
from glora_llm.compare.trial import Trial
from glora_llm.errors import UserError
from glora_llm.launch.device import choose_device
from glora_llm.launch.launcher import written
from glora_llm.launch.machine import commit, hardware, versions
from glora_llm.launch.run_lock import locked
from glora_llm.launch.stop import StopRequest
from glora_llm.models.load import meta_model
from glora_llm.plan.checks import check_combination
from glora_llm.plan.plan import Plan, make_plan, rate_of
from glora_llm.schema import AdapterSection, Recipe
from glora_llm.schema.scores import score_of

VALIDATIONS = 6  # of a run, where the recipe does not say how often


def compare(request: Request) -> int:
    """Run a comparison, or go on with it; return the exit code: 1 when a trial failed.

    Raises:
        UserError: for anything that the user can mend.
        ToldToEnd: when this process was told to end; the same command goes on.
    """
    stop = StopRequest()
    with stop.listening():
        places = slots(request.jobs)
        plan = make_plan(request.recipe, world_size=1)
        _require_targets(request, plan)
        contests = [_enter(request, plan, contender) for contender in request.contenders]
        fits = {contest.contender: contest.fit for contest in contests if contest.fit}
        if request.budget is not None and not request.nearest:
            require_near(fits, request.budget)
        if not fits:
            raise UserError("\n".join(f"{contest.contender.name} cannot run: {contest.why}" for contest in contests))
        if request.race:
            require_rungs(len(fits), plan.steps, _every(request, plan))
        record = Record(request.out, _settings(request, plan))
        _say_entries(contests, request.budget)
        request.out.mkdir(parents=True, exist_ok=True)
        with locked(request.out):
            return Comparison(request, plan, contests, record, Pool(places)).run()


class Comparison:
    """The trials of all methods, in the folder of the comparison.

    Args:
        request: the options.
        plan: of the recipe.
        contests: the methods, each with its knob and parameters, or with the reason why it does not run.
        record: comparison.json.
        pool: where trials run.
    """

    def __init__(self, request: Request, plan: Plan, contests: list[Contest], record: Record, pool: Pool):
        self.request, self.plan, self.contests, self.record, self.pool = request, plan, contests, record, pool
        recipe, out = request.recipe, request.out
        every = _every(request, plan)
        seeds = tuple(range(recipe.training.seed, recipe.training.seed + request.seeds))
        self.setting = Setting(out, request.score, every, seeds, request.forgetting, recipe.output.save_every)
        self.progress = Progress(self._planned(plan.steps), pool.jobs)
        self.before, self.starting = dict(record.seconds), _age()

    def _planned(self, steps: int) -> int:
        """Return the training steps of all trials, as far as they are known before."""
        counts = [len(contest.rates) for contest in self.contests if not contest.why]
        setting = self.setting
        if self.request.race:
            return planned(counts, steps, setting.every, len(setting.seeds))
        rung, more = setting.rung(steps), (len(setting.seeds) - 1) * steps
        halved = (count * rung + -(-count // 2) * (steps - rung) if count > 2 else count * steps for count in counts)
        return sum(halved) + len(counts) * more

    def run(self) -> int:
        """Run what is missing, print the table, and return the exit code."""
        recipe = self.request.recipe
        write_text(self.request.out / RECIPE, recipes.dump(_without_place(recipe, self.request.out)))
        self._write()
        try:
            with self.pool.ended_with_this():
                entered = [contest for contest in self.contests if not contest.why]
                if self.request.race:
                    racers = [Racer.of(contest, self._course(contest)) for contest in entered]
                    Race(self.setting, racers, self.plan.steps, self._write).run()
                else:
                    in_parallel(self._run_one, entered)
        finally:
            self._write()
        print_table(self.record.table | {"settings": self.record.settings})
        print(f"\n{self.request.out / 'comparison.json'}; runs: {self.request.out / 'trials'}", flush=True)
        return int(any(contest.is_defect for contest in self.contests))

    def _course(self, contest: Contest) -> Course:
        return Course(self.setting, partial(self._trial, contest), self.record, self.pool, self.progress)

    def _run_one(self, contest: Contest) -> None:
        """Run all trials of a method."""
        course = self._course(contest)
        try:
            contest.steps = self._steps(contest, course)
            contest.outcome = course.run(contest.rates)
        except NotRun as error:
            contest.why, contest.is_defect = str(error), error.is_defect
        except BaseException:
            self.pool.end()
            raise
        self._write()

    def _steps(self, contest: Contest, course: Course) -> int:
        """Return the steps of a method's runs: the recipe's, or as many as its measured speed allows."""
        if self.request.seconds is None:
            return self.plan.steps
        name = contest.contender.name
        if name not in self.record.speeds:
            contest.steps = max(self.plan.steps, 1000)  # the launch ends long before
            rates = contest.rates
            speed = course.seconds_per_step(self._trial(contest, rates[len(rates) // 2], self.setting.seeds[0]))
            self.record.speeds[name] = speed
            self.record.write()
        return max(1, int(self.request.seconds / self.record.speeds[name]))

    def _trial(self, contest: Contest, lr: float, seed: int) -> Trial:
        value = contest.fit.value if contest.fit and self.request.budget is not None else None
        adapter = contest.contender.settings(self.request.recipe.adapter, value)
        return Trial(contest.contender.name, lr, seed, contest.steps, adapter, self.request.out / "trials")

    def _write(self) -> None:
        """Write comparison.json with the table as far as it is known."""
        record, request = self.record, self.request
        with record.lock:
            record.seconds = {
                "total": self.before["total"] + _age(),
                "starting": self.before["starting"] + self.starting,
                "with_trials": self.before["with_trials"] + self.pool.busy_seconds,
            }
            methods = rows(self.contests, self.setting)
            for row in methods:
                row["steps_spent"] = self._steps_spent(row["name"])
            record.table = {
                "recipe": request.name, "score": request.score, "higher": score_of(request.score).higher,
                "budget": request.budget, "seconds_of_training": request.seconds, "cost": request.cost,
                "race": request.race, "choice": self.setting.choice, "methods": methods,
                "steps_spent": sum(row["steps_spent"] for row in methods), "versions": versions(), "commit": commit(),
                "hardware": hardware(choose_device().type), "command": written(sys.orig_argv, os.environ),
            }  # fmt: skip
            record.write()

    def _steps_spent(self, name: str) -> int:
        """Return the steps of all trials of a method, and those that as many samples as chose its structures make."""
        trials = [trial for trial in self.record.trials.values() if trial["method"] == name]
        return sum(trial.get("trained", 0) + trial.get("selection_steps", 0) for trial in trials)


def _every(request: Request, plan: Plan) -> int:
    """Return the steps between two validations."""
    return request.recipe.evaluation.every or max(1, plan.steps // VALIDATIONS)


def _age() -> float:
    """Return the seconds since this process was started."""
    return time.time() - psutil.Process().create_time()


def _enter(request: Request, plan: Plan, contender: Contender) -> Contest:
    """Return a method at its budget, or with the reason why it cannot run on this recipe."""
    contest = Contest(contender, steps=plan.steps)
    try:
        # what the schema, the table of methods and the combination of settings say, before anything is built
        recipe = _recipe_of(request.recipe, contender, None)
        check_method(recipe.adapter)
        check_combination(recipe, plan.deepspeed.stage)
        fit = solve(plan, contender, lambda value: _recipe_of(request.recipe, contender, value).adapter, request.budget)
        value = fit.value if request.budget is not None else None
        contest.rates = _rates(request, plan, contender, _recipe_of(request.recipe, contender, value))
        contest.fit = fit  # last: what has a fit takes part
    except UserError as error:
        contest.why = str(error)
    return contest


def _rates(request: Request, plan: Plan, contender: Contender, recipe: Recipe) -> tuple[float, ...]:
    """Return the learning rates of a method.

    Raises:
        UserError: where it is to be that of `training.lr: auto`, which does not cover the method.
    """
    if contender.method in WHOLE:
        return request.full_rates or contender.rates
    is_auto = request.rates is None and request.race and request.recipe.training.lr == AUTO
    if request.rates == AUTO or is_auto:
        return (rate_of(recipe, plan.base).lr,)
    return request.rates or contender.rates


def _require_targets(request: Request, plan: Plan) -> None:
    """Check that the modules behind an @ are modules of the model.

    Raises:
        UserError: naming the linears.
    """
    named = [contender for contender in request.contenders if contender.targets is not None]
    if not named:
        return
    bare = meta_model(plan.recipe.model, plan.base.folder)
    modules, linears = [name for name, _ in bare.named_modules()], linear_suffixes(bare)
    for contender in named:
        section = request.recipe.adapter.model_copy(update={"targets": contender.targets, "modules_to_save": None})
        try:
            require_names(section, modules, linears)
        except UserError as error:
            raise UserError(f"--methods: '{contender.name}': {error}") from None


def _recipe_of(recipe: Recipe, contender: Contender, value: int | None) -> Recipe:
    """Return a recipe with a method's adapter section.

    Raises:
        UserError: when the schema refuses it.
    """
    section = contender.settings(recipe.adapter, value)
    values = recipe.model_dump(mode="json", exclude_none=True) | {"adapter": section, "search": None}
    if recipe.training.lr == "auto":  # a comparison tries rates of its own: auto refuses no method here
        values["training"] |= {"lr": contender.rates[0]}
    checked = recipes.validate(values, recipes.Origins(f"method {contender.name}", {}, {}))
    assert isinstance(checked.adapter, AdapterSection)
    return checked


def _without_place(recipe: Recipe, out: Path) -> Recipe:
    return recipe.model_copy(update={"output": recipe.output.model_copy(update={"dir": str(out / "trials" / "RUN")})})


def _settings(request: Request, plan: Plan) -> dict[str, Any]:
    """Return what the comparison is, as comparison.json holds it."""
    splits = [plan.task.train, plan.task.validation, plan.task.test]
    data = hashlib.sha256("".join(rows.digest() for rows in splits if rows is not None).encode()).hexdigest()
    return {
        "recipe": request.recipe.model_dump(mode="json", exclude_defaults=True, exclude={"output", "description"}),
        "budget": request.cost,
        "tolerance": TOLERANCE,
        "score": request.score,
        "methods": [contender.name for contender in request.contenders],
        "seeds": request.seeds,
        "rates": request.rates,
        "full_rates": request.full_rates,
        "race": request.race,
        "forgetting": request.forgetting,
        "base": plan.base.fingerprint,
        "data": data,
    }


def _say_entries(contests: list[Contest], budget: int | None) -> None:
    """Print what each method trains."""
    width = max(len(contest.contender.name) for contest in contests)
    for contest in contests:
        name = f"{contest.contender.name:<{width}}"
        if contest.fit is None:
            print(f"{name} not run: {contest.why}")
            continue
        knob = f"{contest.contender.knob} {contest.fit.value}" if contest.fit.value else "no knob"
        share = f", {contest.fit.parameters / budget - 1:+.1%} of the budget" if budget else ""
        print(f"{name} {contest.fit.parameters:>12,} parameters ({knob}{share})", flush=True)
