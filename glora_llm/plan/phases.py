"""Memory of one process in each phase of a run, by part, from shapes alone: on a GPU."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glora_llm.models.folder import is_ours
from glora_llm.plan.batches import largest_micro_batch, largest_scored_batch, longest_rows
from glora_llm.plan.memory import FLOAT32, GB, ModelSizes, Sharding, adapter_dtype, at_rest, in_dtype
from glora_llm.plan.plan import Plan
from glora_llm.plan.step_memory import Purpose, StepParts, StepShape, step_parts
from glora_llm.schema import Recipe
from glora_llm.training.adam_state import BUCKET
from glora_llm.training.batch import Batch

PARTS = (
    *("base", "quantisation", "adapter", "gradients", "optimizer", "buffers"),
    *("activations", "logits", "workspace", "libraries"),
)
COMPARED, MOST_SAMPLES, MOST_TOKENS = 1024, 16, 256  # by which a merge is compared (tasks/text.py, merge/sample.py)
FLOAT32_COPIES = 6  # matrices that the arithmetic of a merge holds (merge/layers.py)


@dataclass(frozen=True)
class Phase:
    """The memory of one process at the peak of a phase.

    Args:
        name: of the phase.
        parts: bytes on the device, by part; on a CPU all that is resident above the imports.
        host: bytes on the host beside a GPU.
    """

    name: str
    parts: dict[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Subject:
    """A recipe whose memory is asked for.

    Args:
        recipe: checked.
        folder: of the base model: config.json, and weights where they are here.
        sizes: of the model with its adapter.
        dtype: in which the model computes.
        world_size: processes of the launch.
        on_cpu: they compute on CPUs.
        plan: with the data, where these are here; None: every row is taken to be full.
        steps: what passes need, found so far.
    """

    recipe: Recipe
    folder: Path
    sizes: ModelSizes
    dtype: torch.dtype
    world_size: int
    on_cpu: bool
    plan: Plan | None = None
    steps: dict[Purpose, StepParts] = field(default_factory=dict)

    def step(self, purpose: Purpose) -> StepParts:
        """Return what one batch needs beside weights and gradients; followed once."""
        if purpose not in self.steps:
            self.steps[purpose] = step_parts(self._shape(purpose))
        return self.steps[purpose]

    def passed(self, purpose: Purpose) -> dict[str, int]:
        """Return the same by part."""
        return dict(vars(self.step(purpose)))

    def scored(self) -> dict[str, int]:
        """Return what the scoring of a batch needs; nothing where no rows are scored."""
        data = self.recipe.data
        return {} if data.validation is None and data.test is None else self.passed("scoring")

    def searched(self) -> list[dict[str, int]]:
        """Return what each pass of a search needs: first-order importance is of the additive strategy alone."""
        search = self.recipe.search
        additive = search is not None and search.strategy == "additive"
        return [*([self.passed("slopes")] if additive else []), self.scored()]

    def _shape(self, purpose: Purpose) -> StepShape:
        recipe = self.recipe
        rows = recipe.evaluation.batch if purpose == "scoring" else recipe.training.micro_batch
        section = in_dtype(self.dtype, recipe)
        if purpose == "slopes" and section.gradient_checkpointing:  # all activations are kept then, row by row
            rows, section = 1, section.model_copy(update={"gradient_checkpointing": False})
        more: dict[str, Any] = {}
        if self.plan is not None:
            more = {"batch": self._batch(self.plan, purpose, rows), "objective": self.plan.task.objective}
        text = recipe.data.format != "images"
        return StepShape(
            section, self.folder, recipe.adapter, rows, recipe.data.max_tokens, adapter_dtype(recipe, self.dtype),
            purpose=purpose, segments=self.on_cpu and text and not section.compile,
            alike=recipe.vlora is None and not is_ours(self.folder), **more,
        )  # fmt: skip

    def _batch(self, plan: Plan, purpose: Purpose, rows: int) -> Batch:
        if purpose == "training":
            return largest_micro_batch(plan)
        return largest_scored_batch(plan) if purpose == "scoring" else longest_rows(plan, rows)


def passed_through(recipe: Recipe, found: list[Phase]) -> list[Phase]:
    """Return the phases that a recipe goes through."""
    left_out = set()
    if recipe.search is None:
        left_out.add("searching")
    if recipe.data.validation is None and recipe.data.test is None:
        left_out.add("evaluating")
    return [phase for phase in found if phase.name not in left_out]


def gpu_phases(subject: Subject) -> list[Phase]:
    """Return the phases of one of `world_size` GPUs."""
    recipe, sizes, trained = subject.recipe, subject.sizes, sum(subject.sizes.trained)
    memory = at_rest(recipe, sizes, subject.world_size, subject.dtype, 0)
    rest = {
        "base": memory.base - sizes.state_bytes,
        "quantisation": sizes.state_bytes,
        "adapter": memory.adapter,
        "optimizer": memory.optimizer,
    }
    sharding = Sharding.of(recipe.training.deepspeed, subject.world_size)
    offloaded = (FLOAT32 + 8) * sharding.share(trained) if sharding.optimizer_on_cpu else 0
    learning = {"gradients": memory.gradients, "buffers": memory.buffers}
    gathered = {"buffers": memory.buffers} if sharding.stage == 3 else {}
    largest = sizes.largest * subject.dtype.itemsize
    bucket = min(BUCKET, sharding.share(trained)) * FLOAT32
    copies = 3 * FLOAT32 * trained + FLOAT32 * trained * (not recipe.adapter.is_full)
    loaded = {name: rest[name] for name in ("base", "quantisation")}
    found = [
        Phase("loading", loaded | {"workspace": largest}, largest),
        Phase("at rest", rest, offloaded),
        Phase("training", rest | learning | subject.passed("training"), offloaded),
        Phase("evaluating", rest | gathered | subject.scored(), offloaded),
        Phase("saving", rest | {"workspace": bucket * (1 + (subject.world_size > 1))}, offloaded + copies),
    ]
    if recipe.search is not None:
        passes = largest_parts([rest | gathered | parts for parts in subject.searched()])
        found.append(Phase("searching", passes, offloaded))
    merged = {"workspace": FLOAT32_COPIES * FLOAT32 * sizes.largest}
    return passed_through(recipe, [*found, Phase("merging", merged, merging(subject))])


def largest_parts(choices: list[dict[str, int]]) -> dict[str, int]:
    """Return the parts that come to the most."""
    return max(choices, key=lambda parts: sum(parts.values()))


def sum_parts(*parts: dict[str, int]) -> dict[str, int]:
    """Add up parts of the same name."""
    return {name: sum(part.get(name, 0) for part in parts) for name in PARTS if any(name in part for part in parts)}


def merging(subject: Subject) -> int:
    """Return the most that a merge holds on the host: a shard with the adapter, or the logits that it compares."""
    recipe, sizes = subject.recipe, subject.sizes
    shard = min(merged_bytes(subject), int(recipe.merge.max_shard_gb * GB))
    trained = 0 if recipe.adapter.is_full else FLOAT32 * sum(sizes.trained)
    # before, after, their difference and its magnitude; the output head, and the embedding that is not it
    comparing = 4 * compared_tokens(subject) * sizes.vocabulary * FLOAT32 + 2 * FLOAT32 * sizes.largest
    return trained + max(shard + FLOAT32 * sizes.largest, comparing)


def compared_tokens(subject: Subject) -> int:
    """Return the tokens by which a merged model is compared with the unmerged one."""
    plan = subject.plan
    if plan is None or not subject.recipe.output.keep_sample:
        return COMPARED
    rows = plan.task.validation or plan.task.train
    lengths = rows.lengths()[plan.choice(rows, MOST_SAMPLES)]
    return min(COMPARED, int(np.minimum(lengths, MOST_TOKENS).sum()))


def merged_bytes(subject: Subject) -> int:
    """Return the size of the merged model's weights."""
    width: int = getattr(torch, subject.recipe.merge.dtype).itemsize
    return subject.sizes.dense * width
