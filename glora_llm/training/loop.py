"""The training loop. All that is random in it is a function of (seed, step, micro batch), and a resumed run repeats it.

Micro batches are counted over all processes, so the number of processes changes nothing that is random either.
"""

import contextlib
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy
import torch
from torch import distributed as dist

from glora_llm.errors import CheckFailed
from glora_llm.failpoints import reach
from glora_llm.launch.outputs import drop_broken_output
from glora_llm.launch.ranks import broadcast
from glora_llm.launch.stop import StopRequest
from glora_llm.schema import EvaluationSection, Recipe
from glora_llm.training.batch import Batch
from glora_llm.training.best import Best
from glora_llm.training.divergence import LossWatch
from glora_llm.training.engine import Engine, StepResult
from glora_llm.training.flops import ModelCost
from glora_llm.training.metric_log import MetricLog
from glora_llm.training.optim import lr_at


class ValidationLeft(Exception):
    """A process was told to end while validation data were scored; raised on all processes together."""


class NonFinite(CheckFailed):
    """Too many steps in a row without a finite loss and gradient."""


@dataclass
class Hooks:
    """The functions that the loop calls, so that it needs to know neither data, nor model, nor evaluation.

    Args:
        batches: step -> this process's micro batches.
        validate: step -> validation metrics, or None where there is no validation data. Raises ValidationLeft.
        save: (step) writes a checkpoint.
        diagnose: batches -> name of the first module with a non-finite output, for the message when training stops.
        before_micro_step: (step, number of the micro batch among those of the step on all processes), before its
            forward pass (a supernet draws its paths).
        observe: step -> further numbers that are logged with the step's own; all processes call it.
        stop: the request to end, which one process may have got.
        best: of the validations.
    """

    batches: Callable[[int], Sequence[Batch]]
    validate: Callable[[int], dict[str, float]] | None
    save: Callable[[int], None]
    diagnose: Callable[[Sequence[Batch]], str]
    before_micro_step: Callable[[int, int], None] = lambda _step, _micro: None
    observe: Callable[[int], dict[str, float]] = lambda _step: {}
    stop: StopRequest = field(default_factory=StopRequest)
    best: Best = field(default_factory=lambda: Best.of(EvaluationSection()))


@dataclass(frozen=True)
class Schedule:
    """The schedule of validations, checkpoints and records, in optimizer steps.

    Args:
        start: steps that an earlier launch has done.
        total: steps of the whole run.
        validate_every, save_every, log_every: steps between two; each happens after the last step too.
        stop_after: the step after which this launch ends as if told to; None: it does not.
    """

    start: int
    total: int
    validate_every: int | None
    save_every: int
    log_every: int
    stop_after: int | None = None

    @classmethod
    def of(cls, recipe: Recipe, start: int, total: int) -> "Schedule":
        """Return the schedule of a recipe's run of `total` steps, of which `start` are done."""
        evaluation, output, every = recipe.evaluation, recipe.output, recipe.training.log_every
        return cls(start, total, evaluation.every, output.save_every, every, output.stop_after)

    def is_last_here(self, step: int) -> bool:
        """Tell whether this launch ends after `step` steps, and the run does not."""
        return self.stop_after is not None and self.stop_after <= step < self.total

    def due(self, step: int, every: int | None) -> bool:
        """Tell whether something that happens every so many steps, and at the end, happens after `step` steps."""
        return step == self.total or (every is not None and step % every == 0)


def seed_micro_step(seed: int, step: int, number: int) -> None:
    """Seed every generator for one micro batch: no random state needs to be carried over a restart.

    Args:
        number: of the micro batch among those of the step on all processes.
    """
    mixed = (seed * 1_000_003 + step) * 65_537 + number
    random.seed(mixed)
    numpy.random.seed(mixed % 2**32)  # noqa: NPY002 - libraries draw from the global one
    torch.manual_seed(mixed % 2**63)


def fit(engine: Engine, schedule: Schedule, hooks: Hooks, log: MetricLog, cost: ModelCost) -> dict[str, float]:
    """Train to the end of the schedule, or until no better validation comes; return the last validation metrics.

    Raises:
        NonFinite: after `training.max_bad_steps` skipped steps in a row, or where the last step was skipped so, or all.
        ToldToEnd: when a process was told to end, at the next micro batch, after a checkpoint (none after a bad step).
    """
    settings, bad, saved, watch = engine.settings, 0, schedule.start, LossWatch(engine.settings.peak_lr)
    reset_peak_memory(engine.device)
    last_validation = _validate_at_start(schedule, hooks, log, engine.device)
    if schedule.is_last_here(schedule.start) and not hooks.best.is_over:
        raise _end(schedule, hooks, log, schedule.start, save=False)
    for step in range(schedule.total if hooks.best.is_over else schedule.start, schedule.total):
        began = time.perf_counter()
        reach("step.before")
        batches = hooks.batches(step)
        lr = lr_at(step, schedule.total, settings)
        result = engine.train_step(batches, lr, partial(_begin_micro_step, hooks, settings.seed, step), hooks.stop.made)
        if result.abandoned:
            raise _end(schedule, hooks, log, step, save=not bad and step > saved)
        bad = bad + (not result.overflow) if result.skipped else 0
        done = step + 1
        if result.told_to_end:
            drop_broken_output()
        if bad >= settings.max_bad_steps:
            raise NonFinite(_stop_message(engine, batches, hooks, bad, done))
        _say_skipped(result, done, bad, engine, log)
        _say_divergence(result, done, watch, log)
        if done % schedule.log_every == 0 or done == schedule.total:
            values = _metrics(result, lr, batches, engine, cost, time.perf_counter() - began, done, log)
            values |= hooks.observe(done)
            log.scalars(done, values)
            log.progress(done, values)
        if result.told_to_end:  # what is due now is validated by the next launch
            raise _end(schedule, hooks, log, done, save=not bad)
        is_better = False
        if schedule.due(done, schedule.validate_every):
            last_validation = _validate(schedule, hooks, log, done, save=not bad)
            is_better = not bad and _judge(hooks.best, done, last_validation, engine.device)
        is_over = not bad and hooks.best.is_over
        if (schedule.due(done, schedule.save_every) or is_better or is_over) and not bad:
            log.flush()
            hooks.save(done)
            saved = done
        if is_over and done < schedule.total:
            log.say(f"training ends early, after step {done} of {schedule.total}: {hooks.best.reason()}")
            break
        if schedule.is_last_here(done):
            raise _end(schedule, hooks, log, done, save=not bad and saved < done)
    _require_trained(engine, schedule, hooks, bad)
    return last_validation


def _begin_micro_step(hooks: Hooks, seed: int, step: int, number: int) -> None:
    seed_micro_step(seed, step, number)
    hooks.before_micro_step(step, number)


def _say_skipped(result: StepResult, done: int, bad: int, engine: Engine, log: MetricLog) -> None:
    if result.overflow:
        log.say(f"step {done}: a float16 gradient overflowed, step skipped; loss scale {engine.loss_scale.value:g}")
    elif result.skipped:
        log.say(f"step {done}: loss or gradient not finite, step skipped ({bad} in a row)")


def _say_divergence(result: StepResult, done: int, watch: LossWatch, log: MetricLog) -> None:
    text = "" if result.overflow else watch.look(result.loss, result.grad_norm, result.skipped, done)
    if text:
        log.say(text)


def _require_trained(engine: Engine, schedule: Schedule, hooks: Hooks, bad: int) -> None:
    """Check that the last step was a good one, and that any step was applied.

    Raises:
        NonFinite: on all processes, before any final weights are written.
    """
    total = schedule.total
    if bad:
        raise NonFinite(_stop_message(engine, hooks.batches(total - 1), hooks, bad, total))
    if not engine.applied:
        raise NonFinite(
            f"None of {total} steps changed the weights: every float16 gradient overflowed, down to loss scale "
            f"{engine.loss_scale.value}. Nothing was trained. Use model.dtype bfloat16 or float32, or more steps."
        )


def _validate_at_start(schedule: Schedule, hooks: Hooks, log: MetricLog, device: torch.device) -> dict[str, float]:
    """Make up for a validation of the last step that the launch before was told to leave; return its metrics, if any.

    The launch before may also have logged it and then been killed, before a checkpoint held what it means.
    """
    start = schedule.start
    if start == 0 or not schedule.due(start, schedule.validate_every):
        return {}
    is_judged = not hooks.best.watches or hooks.best.seen >= start
    scores: dict[str, float] = {} if is_judged else broadcast(log.values_at(start, "validation/"), device)
    if not scores and (not is_judged or broadcast(log.lacks(start, "validation/"), device)):
        scores = _validate(schedule, hooks, log, start, save=False)
    if not is_judged:
        _judge(hooks.best, start, scores, device)
        hooks.best.written(start)
    return scores


def _judge(best: Best, done: int, scores: dict[str, float], device: torch.device) -> bool:
    """Take in a validation, as the main process measured it; tell whether it is the best so far, and to be kept."""
    return best.watches and best.see(done, broadcast(scores.get(best.name), device)) and best.keeps


def _validate(schedule: Schedule, hooks: Hooks, log: MetricLog, done: int, save: bool) -> dict[str, float]:
    """Log and return the validation metrics after `done` steps.

    Raises:
        ToldToEnd: when a process was told to end; the next launch validates then.
    """
    if hooks.validate is None:
        return {}
    try:
        scores = hooks.validate(done)
    except ValidationLeft:
        raise _end(schedule, hooks, log, done, save) from None
    log.scores(done, scores)
    return scores


def _end(schedule: Schedule, hooks: Hooks, log: MetricLog, done: int, save: bool) -> BaseException:
    """Write a checkpoint of `done` steps, say how the run goes on, and return the end of this process."""
    drop_broken_output()
    if save:
        log.flush()
        hooks.save(done)
    told = hooks.stop.reason or ("output.stop_after" if schedule.is_last_here(done) else None)
    told = told or ("its launcher ended" if hooks.stop.launcher.is_gone() else "a signal to another process")
    log.say(f"told to end ({told}) after step {done} of {schedule.total}. This goes on:\n  {hooks.stop.command}")
    dist.barrier()  # a job manager may kill all processes when the first one leaves: not before the checkpoint
    return hooks.stop.follow()


def _stop_message(engine: Engine, batches: Sequence[Batch], hooks: Hooks, bad: int, step: int) -> str:
    return (
        f"{bad} steps in a row up to step {step} had a loss or gradient that is not finite. First bad module: "
        f"{hooks.diagnose(batches)}. Start again in a new output.dir with a lower training.lr, or a lower "
        "adapter.lr_factors of the slot named here; the last complete checkpoint is kept."
    )


def _metrics(
    result: StepResult, lr: float, batches: Sequence[Batch], engine: Engine, cost: ModelCost, seconds: float,
    done: int, log: MetricLog,
) -> dict[str, float]:  # fmt: skip
    """Return the numbers of one step; tokens are counted on this process and taken to be alike on the others."""
    extents = [engine.objective.extent(batch) for batch in batches]
    tokens, width = sum(count for count, _ in extents) * engine.world_size, max(width for _, width in extents)
    flops = cost.step_flops(tokens, result.targets, width)
    scale = engine.loss_scale.value
    return {
        "train/loss": result.loss,
        "train/lr": lr,
        "train/grad_norm": result.grad_norm,
        "train/label_tokens": result.targets,
        **({} if scale is None else {"train/loss_scale": scale}),
        "train/samples": done * engine.settings.global_batch,
        "train/seconds_per_step": seconds,
        f"train/{log.unit}_per_second": tokens / seconds,
        "train/model_flop_utilisation": flops / seconds / (cost.peak_flops * engine.world_size),
        "train/peak_memory_gb": peak_memory_gb(engine.device),
    }


def peak_memory_gb(device: torch.device) -> float:
    """Return the most memory in use since the last reset, in GB: allocated on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # getrusage would count the parent's peak too
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e9  # type: ignore[index]


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_gb` begin anew at what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # some containers forbid it: the peak is then of the whole process
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
