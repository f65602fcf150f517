"""Forecast of a recipe, before it runs and without weights: parameters, memory, disk and time."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from glora_llm.adapters.inject import inject, without_adapter
from glora_llm.errors import UserError
from glora_llm.launch.device import choose_device
from glora_llm.launch.environment import planned_world_size
from glora_llm.models.load import compute_dtype, linear_names, meta_model
from glora_llm.models.matrices import matrix_shape
from glora_llm.plan.batches import largest_micro_batch
from glora_llm.plan.cpu_phases import cpu_phases
from glora_llm.plan.duration import Duration, duration
from glora_llm.plan.gpu_fit import NO_TRACE, fitting, gpu_dtype, in_words
from glora_llm.plan.memory import FOLLOWED_METHODS, GB, RESERVE, model_sizes
from glora_llm.plan.phases import Phase, Subject, gpu_phases, merged_bytes
from glora_llm.plan.plan import Plan
from glora_llm.plan.step_memory import Purpose, StepParts, without_start
from glora_llm.plan.trained_counts import TrainedCounts, trained_counts
from glora_llm.schema import Recipe
from glora_llm.training import checkpoint
from glora_llm.training.deepspeed_config import accumulation


@dataclass(frozen=True)
class Machine:
    """The devices that a recipe is planned for, one a process.

    Args:
        on_cpu: they are CPUs of one machine; else GPUs.
        count: processes.
        memory: of one device, bytes; None: not known.
        name: of a GPU, by which its peak rate is found; None: not known.
    """

    on_cpu: bool
    count: int
    memory: int | None
    name: str | None

    @classmethod
    def of(cls, gpus: int | None, gpu_gb: float | None, name: str | None) -> "Machine":
        """Return the machine that a command line describes; what it leaves out is this one's.

        Raises:
            UserError: as `choose_device`.
        """
        given = None if gpu_gb is None else round(gpu_gb * GB)
        if choose_device().type == "cuda":
            here = cls.here(gpus or 1)
            return dataclasses.replace(here, memory=given or here.memory, name=name or here.name)
        if gpus is None and gpu_gb is None and name is None:
            return cls.here(planned_world_size())
        return cls(False, gpus or 1, given, name)

    @classmethod
    def here(cls, count: int) -> "Machine":
        """Return this machine, for a launch of so many processes."""
        device = choose_device()
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            return cls(False, count, properties.total_memory, properties.name)
        return cls(True, count, psutil.virtual_memory().available // count, None)

    def describe(self) -> str:
        """Return the machine in words."""
        if self.on_cpu:
            return f"{self.count} process on this CPU"
        memory = "" if self.memory is None else f" of {self.memory / GB:.1f} GB"
        return f"{self.count} {self.name or 'GPU'}{'s' if self.count > 1 else ''}{memory}"


@dataclass(frozen=True)
class Forecast:
    """The parameters, memory, disk and time of a recipe.

    Args:
        machine: that it is planned for.
        dtype: in which the model computes.
        batch: what a micro batch was taken to be, in words.
        counts: trained elements.
        frozen: frozen elements of the dense model.
        phases: memory of one process.
        disk: bytes by what is written.
        time: of training; None where it cannot be said.
        fits: whether the peak, with a reserve, is within the device's memory; None: that is not known.
        unmodelled: why the memory of a step is not among the phases, which are then the least; empty: it is.
        changes: settings that would fit, as written on a command line -> the peak then; empty where it fits.
    """

    machine: Machine
    dtype: str
    batch: str
    counts: TrainedCounts
    frozen: int
    phases: list[Phase]
    disk: dict[str, int]
    time: Duration
    fits: bool | None
    changes: dict[str, int]
    unmodelled: str = ""

    @property
    def peak(self) -> Phase:
        """The phase that needs the most on the device."""
        return max(self.phases, key=lambda phase: phase.total)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, bytes and elements."""
        memory = [dataclasses.asdict(phase) | {"total": phase.total} for phase in self.phases]
        return {
            "machine": dataclasses.asdict(self.machine),
            "dtype": self.dtype,
            "batch": self.batch,
            "trained": {"total": self.counts.total, "frozen": self.frozen, **self.counts._asdict()},
            "memory": memory,
            "peak": {"phase": self.peak.name, "bytes": self.peak.total},
            "disk": self.disk,
            "time": dataclasses.asdict(self.time),
            "fits": self.fits,
            "changes": self.changes,
            "unmodelled": self.unmodelled,
        }


def forecast(recipe: Recipe, folder: Path, machine: Machine, plan: Plan | None) -> Forecast:
    """Compute what a recipe will take.

    Args:
        folder: of the base model: its config.json, and its weights where they are here.
        plan: with the data; None: every row is taken to be full.

    Raises:
        UserError: when the batch does not divide, an adapter does not fit, or the model's step cannot be followed.
    """
    accumulation(recipe.training, machine.count)
    dtype = compute_dtype(recipe.model, torch.device("cpu")) if machine.on_cpu else gpu_dtype(recipe)
    bare = meta_model(recipe.model, folder)
    require_rank(recipe, bare)
    model = inject(bare, without_start(recipe.adapter), recipe.training.seed, 1)
    counts = trained_counts(model)
    subject, unmodelled = subject_of(recipe, folder, machine, plan, dtype), unmodelled_step(recipe)
    if unmodelled:
        subject = dataclasses.replace(subject, steps=_no_steps())
    try:
        found = phases_of(subject)
    except NO_TRACE as error:
        raise UserError(
            "The memory of this recipe cannot be computed: a step of its model cannot be followed without values "
            f"({' '.join(str(error).split())[:200]})."
        ) from error
    peak = max(phase.total for phase in found)
    fits = None if machine.memory is None else peak + reserve(machine) <= machine.memory
    if unmodelled and fits:
        fits = None
    changes: dict[str, int] = {}
    if fits is False and not unmodelled:

        def peak_within(changed: Recipe) -> int | None:
            return _peak_within(changed, folder, machine, plan)

        changes = {in_words(change): size for change, size in fitting(recipe, machine.count, peak_within, True)}
    return Forecast(
        machine=machine,
        dtype=str(dtype).removeprefix("torch."),
        batch=describe_batch(recipe, plan),
        counts=counts,
        frozen=sum(parameter.numel() for parameter in model.parameters()) - counts.total,
        phases=found,
        disk=disk(subject, counts.total),
        time=duration(without_adapter(model), recipe, plan, machine.count, machine.name, machine.on_cpu, dtype),
        fits=fits,
        changes=changes,
        unmodelled=unmodelled,
    )


def reserve(machine: Machine) -> int:
    """Return what is to be left free beside the computed bytes: CUDA's context and fragments, or a CPU's imports."""
    return psutil.Process().memory_info().rss if machine.on_cpu else round(RESERVE)


def subject_of(recipe: Recipe, folder: Path, machine: Machine, plan: Plan | None, dtype: torch.dtype) -> Subject:
    """Return the recipe as a subject of `phases`."""
    sizes = model_sizes(recipe, folder, dtype)
    return Subject(recipe, folder, sizes, dtype, machine.count, machine.on_cpu, plan)


def phases_of(subject: Subject) -> list[Phase]:
    """Return the phases of a recipe on its device."""
    return cpu_phases(subject) if subject.on_cpu else gpu_phases(subject)


def describe_batch(recipe: Recipe, plan: Plan | None) -> str:
    """Return what a micro batch was taken to be."""
    micro = recipe.training.micro_batch
    if plan is not None:
        shape = next(value.shape for key, value in largest_micro_batch(plan).items() if key in ("input_ids", "pixels"))
        size = f"{shape.numel():,} tokens" if len(shape) == 2 else f"{shape[1]} x {shape[2]} pixels each"
        return f"the largest of {micro} samples (packed rows, with packing) in these data, {size}"
    if recipe.data.format == "images":
        return f"{micro} images"
    return f"{micro} full rows of {recipe.data.max_tokens:,} tokens, each a label token (the data were not read)"


def disk(subject: Subject, trained: int) -> dict[str, int]:
    """Return the bytes of what a run writes."""
    recipe = subject.recipe
    each = checkpoint.size(trained, has_adapter=not recipe.adapter.is_full)
    kept = recipe.output.keep + bool(recipe.evaluation.keep_best)
    return {
        "one checkpoint": each,
        f"checkpoints ({kept} kept, one being written)": (kept + 1) * each,
        "model" if recipe.adapter.is_full else "adapter": 4 * trained,
        f"merged model ({recipe.merge.dtype})": merged_bytes(subject),
    }


def unmodelled_step(recipe: Recipe) -> str:
    """Return why the memory of a recipe's step is not computed; empty: it is."""
    method = recipe.adapter.method
    if method in FOLLOWED_METHODS:
        return ""
    return f"activations, logits and workspace of a step of adapter.method {method} are not computed"


def _no_steps() -> dict[Purpose, StepParts]:
    """Return steps that need nothing beside weights and gradients."""
    return dict.fromkeys(("training", "scoring", "slopes"), StepParts())


def require_rank(recipe: Recipe, model: Any) -> None:
    """Check that adapter.rank is below the smaller side of some linear at least.

    Raises:
        UserError: when it is a low rank of none.
    """
    adapter = recipe.adapter
    if adapter.is_full or adapter.is_supernet or adapter.genome is not None:
        return
    linears = [model.get_submodule(name) for name in linear_names(model)]
    largest_side = max((min(matrix_shape(linear)) for linear in linears), default=adapter.rank)
    if adapter.rank > largest_side:
        raise UserError(
            f"adapter.rank is {adapter.rank:,}, and no linear of the model has more than {largest_side:,} rows and "
            f"columns: that is no low rank. Set adapter.rank to {largest_side:,} or less."
        )


def _peak_within(recipe: Recipe, folder: Path, machine: Machine, plan: Plan | None) -> int | None:
    """Return the peak of a changed recipe where it fits."""
    available = (machine.memory or 0) - reserve(machine)
    dtype = compute_dtype(recipe.model, torch.device("cpu")) if machine.on_cpu else gpu_dtype(recipe)
    changed = None if plan is None else dataclasses.replace(plan, recipe=recipe)
    subject = subject_of(recipe, folder, machine, changed, dtype)
    if largest(phases_of(dataclasses.replace(subject, steps=_no_steps()))) > available:
        return None  # a step is followed only where the rest fits
    peak = largest(phases_of(subject))
    return peak if peak <= available else None


def largest(phases: Iterable[Phase]) -> int:
    """Return the bytes of the phase that needs the most."""
    return max(phase.total for phase in phases)
