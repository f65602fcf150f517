"""Train a recipe: plan, build, fit, score, save, search, merge. Read this first; `run/build.py` makes the parts."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import distributed as dist

from glora_llm import recipe as recipes
from glora_llm.evaluation.scoring import score_split
from glora_llm.failpoints import reach
from glora_llm.launch import ranks
from glora_llm.launch.deterministic import check_deterministic, compute_deterministically
from glora_llm.launch.device import choose_device
from glora_llm.launch.environment import planned_process_rank, planned_world_size
from glora_llm.launch.failure import first_failure, followed_while_waiting, forget_failure
from glora_llm.launch.ranks import Processes
from glora_llm.launch.run_lock import RunLock, require_free
from glora_llm.launch.stop import StopRequest
from glora_llm.plan.gpu_fit import describe_memory
from glora_llm.plan.overview import describe_samples, plan_run
from glora_llm.plan.plan import Plan, with_rate
from glora_llm.plan.predicted import predicted_peak_gb
from glora_llm.plan.run_folder import RunFolder
from glora_llm.plan.trained_weights import is_finished
from glora_llm.run.best import describe_best, take_best, trained_steps
from glora_llm.run.build import TrainingParts, build, describe_parts
from glora_llm.run.claim import base_identity, claim
from glora_llm.run.forgetting import text_before, text_without_and_with
from glora_llm.run.further import train_further
from glora_llm.run.generation import answer
from glora_llm.run.launches import note_launch
from glora_llm.run.observe import observed, scores_at_start
from glora_llm.run.saving import insist
from glora_llm.run.search import search_after_training
from glora_llm.run.structure import choose_structure
from glora_llm.schema import Recipe
from glora_llm.training import checkpoint
from glora_llm.training.batch import Batch
from glora_llm.training.diagnosis import first_bad_module
from glora_llm.training.hyperparameters import compared_settings
from glora_llm.training.loop import Hooks, Schedule, ValidationLeft, fit, peak_memory_gb
from glora_llm.training.metric_log import MetricLog


def train(recipe: Recipe, dry_run: bool = False, stop: StopRequest | None = None) -> None:
    """Train a recipe on the processes of this launch, or go on training; score, save, and merge if asked.

    Args:
        dry_run: check everything that needs no weights, print it, and stop.
        stop: listens for the request to end; None: there will be none.

    Raises:
        UserError: for anything that the user can mend; nothing is lost then.
    """
    device = choose_device()  # GPUs that torch cannot use are refused before the data are prepared
    if recipe.training.deterministic:
        check_deterministic(recipe, device)
        compute_deterministically()
    folder = RunFolder(Path(recipe.output.dir))
    recipe = folder.rated(recipe)
    folder.require_same_run(recipe)
    require_free(folder.path, RunLock(folder.path).holder())
    checkpoint.require_resume(folder.checkpoints, recipe.output.resume)
    plan, overview = plan_run(folder.pinned(recipe), weights=not dry_run, world_size=planned_world_size())
    recipe = with_rate(recipe, plan.recipe.training.lr)
    plan = replace(plan, recipe=recipe)
    if dry_run or choose_device().type == "cuda":
        overview += f"\nmemory     {describe_memory(recipe, plan.base.folder, planned_world_size())}"
    if dry_run:
        overview += "\n" + describe_samples(plan)
    if dry_run or planned_process_rank() == 0:
        print(overview, flush=True)
    if dry_run:
        return
    with followed_while_waiting(planned_process_rank()):
        processes = ranks.start()
    if processes.is_main_process:
        folder.path.mkdir(parents=True, exist_ok=True)
    with RunLock(folder.path) as lock:
        holder = ranks.broadcast(lock.take() if processes.is_main_process else None, processes.device)
        require_free(folder.path, holder)
        _train_and_merge(plan, folder, processes, stop)


def _train_and_merge(plan: Plan, folder: RunFolder, processes: Processes, stop: StopRequest | None) -> None:
    """Do all that a launch has to do in a run folder that is locked."""
    recipe = plan.recipe
    if processes.is_main_process:
        forget_failure(folder.path)
    dist.barrier()
    with first_failure(folder.path, processes, lambda: _advice(folder)):
        folder.require_same_base(base_identity(plan, processes.device))
        train_plan(plan, folder, processes, stop)
        folder = train_further(recipe, folder, processes, partial(train_plan, processes=processes, stop=stop))
    ranks.stop()
    if processes.is_main_process and recipe.merge.after_training:
        from glora_llm.merge.after_training import merge_after_training

        merge_after_training(folder)
    if processes.is_main_process:
        from glora_llm.report.summary import print_summary

        print_summary(folder)


def _advice(folder: RunFolder) -> str:
    last = checkpoint.newest(folder.checkpoints)
    return (
        f"The last complete checkpoint is {last}: the same command goes on from it." if last else "No checkpoint yet."
    )


def train_plan(plan: Plan, folder: RunFolder, processes: Processes, stop: StopRequest | None = None) -> None:
    """Build a run, train it from its newest checkpoint or from the start, score it and save it."""
    finished = processes.is_main_process and is_finished(folder, plan.recipe, plan.steps)
    if ranks.broadcast(finished, processes.device):
        if processes.is_main_process:
            print(f"training had ended already, after step {plan.steps}: {folder.trained(plan.recipe)}", flush=True)
        return
    plan, structure = choose_structure(plan, folder, processes)
    parts = build(plan, folder, processes)
    if processes.is_main_process:
        claim(plan, folder, processes.device, structure)
        note_launch(folder, processes, parts.start, stop)
    place, shown = (folder.path, parts.start, plan.steps), (plan.task.unit, plan.recipe.output.trackers)
    with contextlib.closing(MetricLog(*place, processes.is_main_process, *shown)) as log:
        Run(plan, folder, processes, parts, log, stop or StopRequest()).train()
    parts.engine.close()


@dataclass(frozen=True)
class Run:
    """One launch of a run on one process.

    Args:
        plan: the resolved recipe.
        folder: of the run.
        processes: this process among those of the launch.
        parts: the model, the engine and what else the run trains with.
        log: of metrics.
        stop: the request to end.
    """

    plan: Plan
    folder: RunFolder
    processes: Processes
    parts: TrainingParts
    log: MetricLog
    stop: StopRequest

    def train(self) -> None:
        """Train the steps that are left, score, save, and search a supernet."""
        recipe, parts = self.plan.recipe, self.parts
        self._announce()
        if recipe.evaluation.test_before and parts.start == 0:
            self._record({"test_before": self._test("before")})
        if before := text_before(self.plan, parts, self.processes):
            self._record(before)
        if first := scores_at_start(self.plan, parts, self._score):
            self._record(first)
        schedule = Schedule.of(recipe, parts.start, self.plan.steps)
        hooks = Hooks(
            batches=lambda step: self.plan.process_batches(
                step, self.processes.process_rank, self.processes.world_size
            ),
            validate=self._validate if self.plan.task.validation is not None else None,
            save=partial(parts.saver.save_checkpoint, parts.engine),
            diagnose=partial(first_bad_module, parts.model, parts.engine.score),
            before_micro_step=parts.supernet.draw,
            observe=lambda _: observed(parts),
            stop=self.stop,
            best=parts.best,
        )
        with self.stop.deferred():
            validation = fit(parts.engine, schedule, hooks, self.log, parts.cost)
        self._finish(validation)
        if recipe.search:
            self._search()

    def _announce(self) -> None:
        """Log some samples, the memory of the parameters, and the step that the run goes on from."""
        self.log.say(describe_samples(self.plan))
        for line in describe_parts(self.parts, self.plan.recipe.adapter, self.processes.world_size):
            self.log.say(line)
        start = self.parts.start
        if start:
            file = self.folder.checkpoints / f"step-{start}"
            resumed = f"resumed after step {start} of {self.plan.steps} from {file}"
            self.log.say("\n".join([resumed, *self.parts.changes]))
        self.log.text("recipe", recipes.dump(self.plan.recipe))
        self.log.begin(compared_settings(self.plan.recipe, self.parts.trained))

    def _score(self, split: str, limit: int | None, score: Callable[[Batch], Any] | None = None) -> dict[str, float]:
        """Return the scores of a split, on at most `limit` rows; nothing where the recipe has no such rows.

        Args:
            score: batch -> its scores; None: the engine's.
        """
        if self.plan.rows(split) is None:
            return {}
        engine, place = self.parts.engine, (self.processes.process_rank, self.processes.world_size)
        keeps = split == "test" and self.plan.recipe.evaluation.row_scores
        file = self.folder.path / "test_rows.json" if keeps else None
        return score_split(self.plan, split, score or engine.score, engine.gather_rows, *place, limit, file)

    def _test(self, when: str) -> dict[str, float]:
        """Return the scores of the test rows, and of answers to their prompts, `before` or `after` training."""
        return self._score("test", None) | answer(self.plan, self.folder, self.parts, self.processes, when)

    def _validate(self, step: int) -> dict[str, float]:
        """Return the validation scores after a step: of all rows at the end, of evaluation.max_rows before."""
        engine = self.parts.engine

        def score(batch: Batch) -> Any:
            if engine.any_told_to_end(self.stop.made()):
                raise ValidationLeft
            return engine.score(batch)

        self.parts.supernet.largest()
        is_part = step < self.plan.steps or self.parts.best.watches  # what is compared is of the same rows
        return self._score("validation", self.plan.recipe.evaluation.max_rows if is_part else None, score)

    def _finish(self, validation: dict[str, float]) -> None:
        """Score the test rows, and write the final weights and summary.json."""
        parts, total = self.parts, trained_steps(self.parts.best, self.plan.steps)
        summary = self.folder.summary()
        tests = self.plan.recipe.evaluation.test
        scored = "test" in summary or not tests
        if parts.start >= total and summary.get("steps") == total and scored and parts.saver.is_written:
            self.log.say(f"training had ended already, after step {total}")
            return
        skipped = total - parts.engine.applied
        deployed = take_best(self.folder, parts, self.processes, total)
        if parts.best.watches and (deployed != total or self.plan.recipe.evaluation.max_rows or not validation):
            validation = self._score("validation", None)
        tensors = parts.saver.gather(parts.engine)
        parts.supernet.largest()
        test = self._test("after") if tests else {}
        text = text_without_and_with(self.plan, parts, self.processes, summary)
        if not self.processes.is_main_process:
            return
        parts.saver.save_result(tensors)
        self.log.test_scores(total, test)
        self.log.end(compared_settings(self.plan.recipe, parts.trained), validation, test)
        self._record(
            {
                "steps": total,
                "validation": validation or summary.get("validation", {}),
                **({"test": test} if tests else {}),
                **text,
                "trained_parameters": parts.trained,
                "seconds": parts.clock.seconds(),
                "peak_memory_gb": peak_memory_gb(self.processes.device),
                "predicted_peak_gb": predicted_peak_gb(self.plan, self.processes),
                "load_peak_gb": parts.load_peak_gb,
                "bytes_per_rank": parts.engine.held().bytes,
                "skipped_steps": skipped,
                **describe_best(parts.best, deployed, self.plan.steps),
            }
        )
        reach("result.after_summary")

    def _search(self) -> None:
        """Search the supernet that was trained, and score the genome of each limit on the test rows."""
        parts = self.parts
        results = search_after_training(
            self.plan, self.folder, parts.model, parts.engine, self.processes, self.log.say,
            lambda: self._score("test", None),
        )  # fmt: skip
        if results:
            self._record({"search": results, "test_genome": next(iter(results.values()))["test"]})

    def _record(self, values: dict[str, Any]) -> None:
        """Add values to summary.json; the first process writes."""
        if self.processes.is_main_process:
            file = self.folder.path / "summary.json"
            insist(lambda: self.folder.update_summary(values), file, self.folder.checkpoints)
