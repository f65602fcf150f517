"""Resolve a recipe without loading weights: base model, tokenizer, data, order of the rows, number of steps.

Train, dry run, evaluate and merge all start from a `Plan`. Mistakes of a recipe are found here.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from glora_llm.adapters.auto_rate import AutoRate, auto_rate, width_of
from glora_llm.adapters.config import read_genome
from glora_llm.data.sampler import GlobalSampler, permutation
from glora_llm.errors import Problems, UserError
from glora_llm.glora.path import Genome
from glora_llm.launch.cpu_memory import resident_bytes
from glora_llm.launch.device import choose_device
from glora_llm.models.config_file import load_config
from glora_llm.models.load import compute_dtype
from glora_llm.models.resolve import ResolvedModel
from glora_llm.plan.answers import check_answers
from glora_llm.plan.checks import check_combination, check_offload, check_watched_score
from glora_llm.plan.prompt_checks import check_packing
from glora_llm.plan.run_folder import RunFolder
from glora_llm.plan.teacher import find_teacher
from glora_llm.schema import Recipe
from glora_llm.search.budget import check_short_run, require_rows
from glora_llm.tasks.heads import head_task
from glora_llm.tasks.images import image_task
from glora_llm.tasks.multiple_choice import choice_task
from glora_llm.tasks.task import Rows, Task
from glora_llm.tasks.text import text_task
from glora_llm.training.batch import Batch
from glora_llm.training.deepspeed_config import DeepSpeedConfig, resolve_deepspeed_config

TASKS: dict[str, Callable[[Recipe, bool], tuple[ResolvedModel, Task]]] = {  # data.format -> its task; else text
    "images": image_task,
    "multiple_choice": choice_task,
}
CHOICE = 41  # stream of the seeded choice of scored rows


@dataclass(frozen=True)
class Plan:
    """A resolved recipe.

    Args:
        recipe: as it was read and checked.
        deepspeed: the DeepSpeed configuration, completed for the processes of this launch.
        base: the base model's folder and identity.
        task: the data and the loss.
        sampler: the order of the training rows.
        steps: optimizer steps of the run.
        genome: the content of adapter.genome, if there is one.
        resident: bytes of this process before all of that was read.
        teacher: the model that is learnt from, with training.distill.
        rate: what `training.lr: auto` was replaced by in the recipe; None: it is a number of the recipe.
    """

    recipe: Recipe
    deepspeed: DeepSpeedConfig
    base: ResolvedModel
    task: Task
    sampler: GlobalSampler
    steps: int
    genome: Genome | None = None
    resident: int = 0
    teacher: ResolvedModel | None = None
    rate: AutoRate | None = None

    def batch(self, rows: Rows, indices: list[int]) -> Batch:
        """Return rows as the tensors of one forward pass."""
        return self.task.batch(rows, indices)

    def batch_identity(self) -> str:
        """Return the arithmetic of a step in words."""
        training, parts = self.recipe.training, self.deepspeed.accumulation
        batch, micro = training.global_batch, training.micro_batch
        world_size = batch // (micro * parts)
        return f"global batch {batch} = micro batch {micro} x accumulation {parts} x processes {world_size}"

    def process_batches(self, step: int, process_rank: int, world_size: int) -> list[Batch]:
        """Return the micro batches of one process in one optimizer step."""
        micro = self.recipe.training.micro_batch
        parts = self.sampler.process_rows(step, process_rank, world_size, micro)
        return [
            self.task.training_batch(rows, step, (n * world_size + process_rank) * micro)
            for n, rows in enumerate(parts)
        ]

    def rows(self, split: str) -> Rows | None:
        """Return the rows of `validation`, `test` (of several sets the first) or `test/NAME`; None: there are none."""
        if split == "validation":
            return self.task.validation
        return self.task.tests.get(split, self.task.test if split == "test" else None)

    def splits(self, split: str) -> list[str]:
        """Return what is scored as `split`: itself, or for `test` each of several named sets."""
        return list(self.task.tests) if split == "test" and self.task.tests else [split]

    def choice(self, rows: Rows, limit: int | None) -> list[int]:
        """Return `limit` row numbers in a seeded order, or all; files are often sorted by class."""
        order = permutation(len(rows), self.recipe.training.seed, CHOICE)
        return [int(row) for row in order[:limit]]


def make_plan(recipe: Recipe, weights: bool = True, world_size: int | None = None) -> Plan:
    """Resolve everything that needs no weights and no process group; every process may call this at once.

    Args:
        weights: False leaves the weights of a hub model where they are (a dry run).
        world_size: processes of the launch that trains; None: nothing is trained.

    Raises:
        UserError: with everything in the recipe that cannot work.
    """
    resident = resident_bytes()
    device = torch.device("cpu") if world_size is None else choose_device()  # without training, none is needed
    dtype = compute_dtype(recipe.model, device)
    found = Problems()
    with found.collected():
        deepspeed = resolve_deepspeed_config(recipe.training, dtype, world_size)
        check_combination(recipe, deepspeed.stage)
        check_offload(recipe, deepspeed)
        if world_size is not None:
            check_packing(recipe)
    with found.collected():
        genome = None if recipe.adapter.genome is None else read_genome(Path(recipe.adapter.genome))
    with found.collected():
        base, task = (head_task if recipe.head else TASKS.get(recipe.data.format, text_task))(recipe, weights)
        teacher = find_teacher(recipe, base, task, weights) if world_size is not None else None
        if world_size is not None:
            check_watched_score(recipe, task)
        rate = _rate(recipe, base)
        require_rows(recipe.adapter, len(task.train))
    found.raise_all()
    check_answers(recipe, task, base.folder, trains=world_size is not None)
    os.environ["HF_HUB_OFFLINE"] = "1"  # all is here now: an outage later cannot hurt
    if rate is not None:
        recipe = with_rate(recipe, rate.lr)
    training = recipe.training
    sampler = GlobalSampler(len(task.train), training.global_batch, training.seed)
    steps = training.steps or sampler.steps_for(training.epochs or 1)
    check_short_run(recipe.adapter, steps, training.global_batch, dtype is torch.float16)
    return Plan(recipe, deepspeed, base, task, sampler, steps, genome, resident, teacher, rate)


def with_rate(recipe: Recipe, lr: float | Literal["auto"]) -> Recipe:
    """Return a recipe with another peak learning rate."""
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"lr": lr})})


def _rate(recipe: Recipe, base: ResolvedModel) -> AutoRate | None:
    """Return the number for `training.lr: auto`; None where the recipe has a number."""
    if recipe.training.lr != "auto":
        return None
    return rate_of(recipe, base)


def rate_of(recipe: Recipe, base: ResolvedModel) -> AutoRate:
    """Return the number that `training.lr: auto` stands for with a recipe's adapter.

    Raises:
        UserError: for a method that it does not cover.
    """
    width, ratio = width_of(load_config(base.folder)), recipe.training.loraplus_ratio
    return auto_rate(recipe.adapter, width, base.name, ratio)


def require_same_base(folder: RunFolder, plan: Plan) -> torch.dtype:
    """Return the dtype that the base was trained in, after checking that this is that base.

    A model that was trained as a whole may stand for its own base.

    Raises:
        UserError: when the base is another one, or the run never started.
    """
    trained = folder.base()
    if not trained:
        raise UserError(f"{folder.path} has no base.json: its training never started.")
    if plan.base.folder.resolve() != folder.model.resolve():
        base = {"name": plan.base.name, "fingerprint": plan.base.fingerprint, "dtype": trained["dtype"]}
        folder.require_same_base(base)
    dtype: torch.dtype = getattr(torch, trained["dtype"])
    return dtype
