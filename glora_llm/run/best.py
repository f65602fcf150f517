"""The end of a run that keeps its best checkpoint: its weights are what is scored, written and deployed."""

from pathlib import Path
from typing import Any

from glora_llm.adapters.stateful import load_state
from glora_llm.launch import ranks
from glora_llm.launch.ranks import Processes
from glora_llm.plan.run_folder import RunFolder
from glora_llm.run.build import TrainingParts
from glora_llm.training import checkpoint
from glora_llm.training.best import Best
from glora_llm.training.sharding import set_whole


def trained_steps(best: Best, steps: int) -> int:
    """Return the steps that a run which has ended was trained: all, or those before it ended early."""
    return best.seen if best.is_over else steps


def take_best(folder: RunFolder, parts: TrainingParts, processes: Processes, total: int) -> int:
    """Put the weights of the checkpoint that validated best into the model; all processes call this.

    Where that checkpoint is gone or damaged, the last weights stay, and a warning says so.

    Args:
        total: steps that were trained.

    Returns:
        the step whose weights the model has now.
    """
    if not parts.best.keeps:
        return total
    found = _checkpoint(folder, parts.best, total) if processes.is_main_process else None
    chosen = ranks.broadcast(found, processes.device)
    if chosen is None:
        return total
    items = parts.engine.trainables
    tensors, trainer = checkpoint.read(chosen, [item.name for item in items])
    for item in items:
        set_whole(item.parameter, tensors[f"master/{item.name}"])
    parts.engine.restore(tensors, trainer["applied"], trainer.get("loss_scale", {}))
    if parts.saver.method is not None:
        load_state(parts.saver.method, chosen / "adapter")
    return checkpoint.step_of(chosen)


def _checkpoint(folder: RunFolder, best: Best, total: int) -> Path | None:
    """Return the best checkpoint; None where that is the last one, or there is none."""
    if best.kept == total:
        return None
    chosen = folder.checkpoints / f"step-{best.kept}"
    problem = "none was written" if not best.kept else checkpoint.fault(chosen) if chosen.is_dir() else "it is gone"
    if problem is None:
        print(f"deployed are the weights after step {best.kept}: {best.name} {best.score:.4f} is the best", flush=True)
        return chosen
    print(
        f"warning: the best checkpoint ({best.name}, step {best.step}) cannot be taken: {problem}. The last weights, "
        f"after step {total}, are deployed; `--step` of merge and evaluate takes another checkpoint.",
        flush=True,
    )
    return None


def describe_best(best: Best, deployed: int, steps: int) -> dict[str, Any]:
    """Return what summary.json says of the best validation; nothing where nothing went by it.

    Args:
        deployed: step of the final weights.
        steps: of the recipe.
    """
    if not best.watches:
        return {}
    found = {"score": best.name, "value": best.score, "step": best.step}
    early = best.is_over and best.seen < steps
    return {"best": found, "deployed_step": deployed, "stopped_early": best.reason() if early else None}
