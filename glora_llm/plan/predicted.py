"""The peak of a run's memory, computed from shapes, to stand beside the one that was measured."""

from glora_llm.launch.ranks import Processes
from glora_llm.models.load import compute_dtype
from glora_llm.plan.forecast import Machine, phases_of, subject_of
from glora_llm.plan.gpu_fit import NO_TRACE
from glora_llm.plan.memory import GB, TRACED_METHODS, compute_memory
from glora_llm.plan.plan import Plan

MEASURED = ("training", "evaluating", "saving")  # phases that summary.json's peak_memory_gb is of


def predicted_peak_gb(plan: Plan, processes: Processes) -> float | None:
    """Return the computed peak of training, evaluation and saving on this process, GB; None: it cannot be computed.

    On a CPU it is the resident set: what was resident before the plan was made, and what the largest batches of its
    data need. On a GPU it is what the start computed, with full rows.
    """
    recipe, folder, device = plan.recipe, plan.base.folder, processes.device
    if recipe.adapter.method not in TRACED_METHODS:
        return None
    dtype = compute_dtype(recipe.model, device)
    try:
        if device.type == "cuda":
            return compute_memory(recipe, folder, processes.world_size, dtype).training / GB
        subject = subject_of(recipe, folder, Machine(True, processes.world_size, None, None), plan, dtype)
        peak = max(phase.total for phase in phases_of(subject) if phase.name in MEASURED)
    except NO_TRACE:  # a family that cannot be followed without values; the run has ended well all the same
        return None
    return (plan.resident + peak) / GB
