"""Composition root: recipe -> plan -> model -> adapter -> engine -> fit -> save -> merge. Read this first."""

import contextlib
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from glora_llm import recipe as recipes
from glora_llm.adapters.adalora import RankAllocation
from glora_llm.adapters.inject import adapted_layers, inject, without_adapter
from glora_llm.adapters.weights import load_start, trainables
from glora_llm.errors import UserError
from glora_llm.evaluation.scoring import score_split
from glora_llm.glora.path_sampler import Supernet
from glora_llm.launch import ranks
from glora_llm.launch.device import choose_device
from glora_llm.launch.ranks import Processes
from glora_llm.models import load
from glora_llm.models.families import layers
from glora_llm.plan.genome import finetune_recipe
from glora_llm.plan.gpu_fit import describe_memory
from glora_llm.plan.overview import describe
from glora_llm.plan.plan import Plan, batch_identity, make_plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.run.saving import Saver
from glora_llm.run.search import search_after_training
from glora_llm.schema import Recipe
from glora_llm.training import checkpoint
from glora_llm.training.deepspeed_config import read_deepspeed_config, zero_stage
from glora_llm.training.diagnosis import first_bad_module
from glora_llm.training.engine import Engine
from glora_llm.training.flops import measure_cost
from glora_llm.training.loop import Hooks, Schedule, fit, peak_memory_gb
from glora_llm.training.metric_log import MetricLog
from glora_llm.training.stop import StopRequest
from glora_llm.vlora import m_steps, vlora_layers


def train(recipe: Recipe, dry_run: bool = False) -> None:
    """Run a recipe on this launch's ranks: train (or go on training), score, save, and merge if asked.

    Args:
        dry_run: check everything that needs no weights, print it, and stop.

    Raises:
        UserError: for anything that the user can mend; nothing is lost then.
    """
    choose_device()  # GPUs that torch cannot use are refused before the data are prepared
    folder = RunFolder(Path(recipe.output.dir))
    folder.require_same_run(recipe)
    checkpoint.require_resume(folder.checkpoints, recipe.output.resume)
    batch_identity(recipe, ranks.planned_world_size())
    plan = make_plan(recipe, weights=not dry_run)
    overview = describe(plan, ranks.planned_world_size())  # the last of the checks, before any weight is loaded
    if dry_run or choose_device().type == "cuda":
        overview += f"\nmemory     {describe_memory(recipe, plan.base.folder, ranks.planned_world_size())}"
    if dry_run or ranks.planned_process_rank() == 0:
        print(overview, flush=True)
    if dry_run:
        return
    processes = ranks.start()
    folder.require_same_base(base_identity(plan, processes.device))
    if processes.is_main_process:
        folder.path.mkdir(parents=True, exist_ok=True)
        ranks.forget_failure(folder.path)
    dist.barrier()
    with ranks.first_failure(folder.path, processes.process_rank, lambda: _advice(folder)):
        Run(plan, folder, processes).go()
        if recipe.search and recipe.search.finetune_steps:
            tuned = ranks.broadcast(finetune_recipe(folder) if processes.is_main_process else None, processes.device)
            folder = RunFolder(Path(tuned.output.dir))
            Run(make_plan(tuned), folder, processes).go()
    ranks.stop()
    if processes.is_main_process and recipe.merge.after_training and not (folder.path / "merged").exists():
        from glora_llm.merge.command import merge_run

        merge_run(folder.path, folder.path / "merged")
    if processes.is_main_process:
        from glora_llm.report.summary import print_summary

        print_summary(folder)


def _advice(folder: RunFolder) -> str:
    last = checkpoint.newest(folder.checkpoints)
    return (
        f"The last complete checkpoint is {last}: the same command goes on from it." if last else "No checkpoint yet."
    )


def base_identity(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Return what a later merge must find again: which base, computed in which dtype."""
    dtype = str(load.compute_dtype(plan.recipe.model, device)).removeprefix("torch.")
    base = plan.base
    return {"name": base.name, "revision": base.revision, "fingerprint": base.fingerprint, "dtype": dtype}


@dataclass
class Run:
    """One launch of a run on one rank."""

    plan: Plan
    folder: RunFolder
    processes: Processes

    def go(self) -> None:
        """Build, resume, train, score and save."""
        self.began, self.earlier_seconds = time.time(), 0.0
        self.data_digest = self.plan.task.train.digest()  # reads all training data: once a launch
        self._build()
        self._claim()
        start = self._resume()
        unit = self.plan.task.unit
        with contextlib.closing(
            MetricLog(self.folder.path, start, self.plan.steps, self.processes.is_main_process, unit)
        ) as log:
            self._announce(log, start)
            self._train(log, start)
        self.engine.close()

    def _train(self, log: MetricLog, start: int) -> None:
        recipe = self.plan.recipe
        if recipe.evaluation.test_before and start == 0:
            self._record({"test_before": self._score("test", None)})
        schedule = Schedule(
            self.plan.steps, recipe.evaluation.every, recipe.output.save_every, recipe.training.log_every
        )
        request = StopRequest()
        hooks = Hooks(
            batches=lambda step: self.plan.rank_batches(step, self.processes.process_rank, self.processes.world_size),
            validate=self._validate if self.plan.task.validation is not None else None,
            save=partial(self.saver.checkpoint, self.engine),
            diagnose=partial(first_bad_module, self.model, self.engine.score),
            before_micro_step=self.supernet.draw,
            observe=self._observe,
            told_to_end=lambda: request.made,
        )
        with request.listening():
            last = fit(self.engine, start, schedule, recipe.training, recipe.output, hooks, log, self.cost)
        self._finish(log, last, start)
        if recipe.search:
            self._search(log)

    def _build(self) -> None:
        recipe, device = self.plan.recipe, self.processes.device
        zero3 = zero_stage(read_deepspeed_config(recipe.training.deepspeed)) == 3
        base = load.load_base(recipe.model, self.plan.base.folder, device, zero3)
        self.model = inject(base, recipe.adapter, recipe.training.seed, self.plan.steps)
        self.trainables = trainables(self.model, recipe.adapter, recipe.training.loraplus_ratio)
        self.trained = sum(item.parameter.numel() for item in self.trainables)
        each = checkpoint.size(self.trained, has_adapter=not recipe.adapter.is_full)
        checkpoint.require_space(self.folder.checkpoints, each, recipe.output.keep)
        dtype, bare = load.compute_dtype(recipe.model, device), without_adapter(self.model)
        self.cost = measure_cost(bare, base.config, dtype, device, self.plan.task.causal)
        self.loaded = self._find_checkpoint()
        if self.loaded:
            for item in self.trainables:
                item.parameter.data.copy_(self.loaded[0][f"master/{item.name}"])
        elif recipe.adapter.weights:
            load_start(self.trainables, Path(recipe.adapter.weights))
        self.supernet = self._supernet()
        objective = self.plan.task.objective(bare)
        self.allocation = RankAllocation(self.model) if recipe.adapter.method == "adalora" else None
        penalty = self.allocation.penalty if self.allocation else None
        self.engine = Engine(objective, self.trainables, recipe.training, dtype, device, penalty)
        if self.allocation:
            self.engine.adam.optimizer.register_step_post_hook(self.allocation.allocate)
        self.shared = list(layers(bare)) if recipe.adapter.is_full and vlora_layers(bare) else []
        self.saver = Saver(
            self.plan, self.folder, self.model, self.allocation, self.processes.is_main_process, self._facts
        )

    def _observe(self, step: int) -> dict[str, float]:
        """The size of what each layer adds to the one before it: the M step of the VLoRA paper."""
        return {f"vlora/increment/layer_{number:02d}": size for number, size in m_steps(self.shared).items()}

    def _supernet(self) -> Supernet:
        """The layers whose paths are drawn; none of them where the recipe fixes the paths."""
        adapter = self.plan.recipe.adapter
        layers, section = adapted_layers(self.model) if adapter.is_supernet else {}, adapter.supernet
        rank = self.processes.process_rank if section and section.draws == "per_rank" else None
        return Supernet(layers, self.plan.recipe.training.seed, rank)

    def _claim(self) -> None:
        """Write whose folder this is: now that nothing of the recipe and of the checkpoint can be refused any more."""
        if self.processes.is_main_process:
            self.folder.write("recipe.yaml", recipes.dump(self.plan.recipe))
            identity = base_identity(self.plan, self.processes.device)
            self.folder.write("base.json", json.dumps(identity, indent=1) + "\n")
            if self.plan.recipe.adapter.genome:
                self.folder.write("genome.json", Path(self.plan.recipe.adapter.genome).read_text())

    def _find_checkpoint(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Let the first rank choose (and verify) the checkpoint; return its content, or None at a new start."""
        newest = checkpoint.newest(self.folder.checkpoints) if self.processes.is_main_process else None
        found = ranks.broadcast(newest, self.processes.device)
        if found is None and self.plan.recipe.output.resume == "must":
            raise UserError(f"output.resume is must, and {self.folder.checkpoints} has no complete checkpoint.")
        if found is None:
            return None
        tensors, trainer = checkpoint.read(found, [item.name for item in self.trainables])
        if trainer["data_digest"] != self.data_digest:
            raise UserError(
                f"The training rows differ from those that {found} was trained on: {self.plan.recipe.data.source} has "
                "changed since. Put the data back, or choose another output.dir."
            )
        return tensors, trainer

    def _resume(self) -> int:
        if self.loaded is None:
            return 0
        tensors, trainer = self.loaded
        self.engine.restore(tensors, trainer["applied"], trainer.get("loss_scale", {}))
        self.loaded = None
        step, self.earlier_seconds = int(trainer["step"]), trainer["seconds"]
        if self.allocation:
            self.allocation.restore(self.folder.checkpoints / f"step-{step}" / "adapter")
        return step

    def _announce(self, log: MetricLog, start: int) -> None:
        for number, text in enumerate(self.plan.task.previews, 1):
            log.say(f"sample {number}, {text}")
        log.say(
            f"{self.engine.bytes_per_rank() / 1e6:.1f} MB of parameters on each of {self.processes.world_size} ranks"
        )
        if start:
            log.say(f"resumed after step {start} of {self.plan.steps} from {self.folder.checkpoints / f'step-{start}'}")
        log.text("recipe", recipes.dump(self.plan.recipe))

    def _score(self, split: str, limit: int | None) -> dict[str, float]:
        if self.plan.rows(split) is None:
            return {}
        engine, processes = self.engine, self.processes
        return score_split(
            self.plan, split, engine.score, engine.gather_rows, processes.process_rank, processes.world_size, limit
        )

    def _validate(self, step: int) -> dict[str, float]:
        self.supernet.largest()
        return self._score("validation", None if step == self.plan.steps else self.plan.recipe.evaluation.max_rows)

    def _facts(self) -> dict[str, Any]:
        return {"data_digest": self.data_digest, "seconds": self.earlier_seconds + time.time() - self.began}

    def _finish(self, log: MetricLog, validation: dict[str, float], start: int) -> None:
        summary = self.folder.summary()
        if start >= self.plan.steps and "test" in summary and self.saver.written:
            log.say(f"training had ended already, after step {self.plan.steps}")
            return
        tensors = self.saver.gathered(self.engine)
        self.supernet.largest()
        scores = self._score("test", None)
        if not self.processes.is_main_process:
            return
        self.saver.result(tensors)
        log.hyperparameters(recipes.flat(self.plan.recipe), {f"final/{k}": v for k, v in (validation | scores).items()})
        self._record(
            {
                "steps": self.plan.steps,
                "validation": validation or summary.get("validation", {}),
                "test": scores,
                "trained_parameters": self.trained,
                "seconds": self._facts()["seconds"],
                "peak_memory_gb": peak_memory_gb(self.processes.device),
                "bytes_per_rank": self.engine.bytes_per_rank(),
                "skipped_steps": self.plan.steps - self.engine.applied,
            }
        )

    def _search(self, log: MetricLog) -> None:
        results = search_after_training(self.plan, self.folder, self.model, self.engine, self.processes, log.say)
        if results:
            self._record({"search": results, "test_genome": self._score("test", None)})

    def _record(self, values: dict[str, Any]) -> None:
        if self.processes.is_main_process:
            self.folder.update_summary(values)
