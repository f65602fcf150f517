"""Find and verify what a run trained: the final weights, or those of a kept checkpoint."""

from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from glora_llm.adapters.start import ADAPTER_WEIGHTS
from glora_llm.adapters.weights import adapter_fault
from glora_llm.errors import UserError
from glora_llm.files.json_file import read_object
from glora_llm.plan.run_folder import RunFolder
from glora_llm.schema import Recipe
from glora_llm.training import checkpoint


class TrainedWeights(NamedTuple):
    """The folder of an adapter, or of a model that was trained as a whole, and the checkpoint that it is part of.

    A checkpoint of a whole model has no such folder: the weights are in its `state.safetensors`.
    """

    weights: Path
    checkpoint: Path | None


def trained_weights(folder: RunFolder, step: int | None = None) -> TrainedWeights:
    """Return what a run trained, with its checksums verified.

    Args:
        step: of a kept checkpoint; None: the end of the run.

    Raises:
        UserError: when it is not there or damaged, with how to get it back.
    """
    if step is not None:
        found = _checkpoint(folder, step)
        _require_readable(found / "adapter", folder.recipe())
        return TrainedWeights(found / "adapter", found)
    recipe = folder.recipe()
    weights = folder.trained(recipe)
    problem = final_fault(folder, recipe)
    if problem is not None and (folder.has_ended or (weights / checkpoint.MANIFEST).is_file()):
        raise UserError(f"{weights}: {problem}. {_how_to_get_back(folder)}")
    if problem is None:
        _require_readable(weights, recipe)
    return TrainedWeights(weights, None)


def best_step(folder: RunFolder) -> int | None:
    """Return the checkpoint that `--best` names; None: the final weights, the best ones of a run that has ended.

    Raises:
        UserError: when the run keeps no best checkpoint, or has validated none so far.
    """
    section = folder.recipe().evaluation
    if not section.keep_best:
        raise UserError(
            f"--best: {folder.path} was trained without evaluation.keep_best, so no checkpoint counts as the best. "
            "Leave it out for the end of the run, or name a checkpoint by --step."
        )
    if folder.has_ended:
        return None
    newest = checkpoint.newest(folder.checkpoints)
    step = 0 if newest is None else checkpoint.best_step(newest)
    if not step:
        raise UserError(f"--best: {folder.path} has not ended, and no checkpoint has validated so far. Train on.")
    return step


def _require_readable(adapter: Path, recipe: Recipe) -> None:
    """Check what checksums cannot say: an adapter without them may be cut off, and a broken one has them all the same.

    Raises:
        UserError: when a file cannot be read, a value is not finite, or the rank or alpha is not the recipe's.
    """
    section = recipe.adapter
    if section.is_full:
        return
    config = read_object(adapter / "adapter_config.json", "Put a copy of the adapter back.")
    wanted = {"rank": section.rank, "alpha": section.alpha} if section.method == "glora" else {}
    for key, value in wanted.items():
        if config.get(key) != value:
            raise UserError(
                f"{adapter / 'adapter_config.json'} says {key} {config.get(key)}, and the run's recipe {value}. Put "
                "the file back as it was written."
            )
    file = adapter / ADAPTER_WEIGHTS
    try:
        with safe_open(file, framework="pt") as opened:
            broken = [name for name in opened.keys() if not opened.get_tensor(name).isfinite().all()]  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{file} is damaged: {error}. Put a copy of the adapter back.") from error
    if broken:
        raise UserError(
            f"{file}: {broken[0]} holds values that are not finite: the training diverged, or the file is damaged. "
            "Take an earlier checkpoint (--step), or train again with a lower training.lr."
        )


def final_fault(folder: RunFolder, recipe: Recipe) -> str | None:
    """Return what is wrong with the final weights of a run, or None when they are there and as they were written."""
    weights = folder.trained(recipe)
    name = "config.json" if recipe.adapter.is_full else ADAPTER_WEIGHTS
    problem = None if recipe.adapter.is_full else adapter_fault(weights)
    return problem or (None if (weights / name).is_file() else f"{name} is missing")


def is_finished(folder: RunFolder, recipe: Recipe, steps: int) -> bool:
    """Tell whether a run has ended and its final weights say so alone: its last checkpoint was deleted, or is damaged.

    Args:
        steps: optimizer steps of the run.

    Raises:
        UserError: when the run had ended, and neither its weights nor a checkpoint are left; or a search is still to
            do, which goes on from a checkpoint.
    """
    summary = folder.summary()
    ended = summary.get("steps") == steps or (recipe.evaluation.patience and summary.get("stopped_early"))
    if not ended:
        return False
    steps = summary["steps"]
    last = folder.checkpoints / f"step-{steps}"
    if last.is_dir() and checkpoint.fault(last) is None:
        return False
    problem = final_fault(folder, recipe)
    if problem is not None:
        if checkpoint.newest(folder.checkpoints) is None:
            raise UserError(f"{folder.path} had ended after step {steps}, and {_nothing_left(folder)}")
        return False
    if recipe.search is not None and "search" not in folder.summary():
        raise UserError(
            f"{folder.path} had ended after step {steps}, and no checkpoint is left from which its search could go on. "
            f"`glora-llm search {folder.path}` searches the trained supernet."
        )
    return True


def _checkpoint(folder: RunFolder, step: int) -> Path:
    found = folder.checkpoints / f"step-{step}"
    if not found.is_dir():
        kept = ", ".join(str(checkpoint.step_of(path)) for path in checkpoint.checkpoints(folder.checkpoints))
        raise UserError(f"{folder.path} has no checkpoint of step {step}; kept: {kept or 'none'}.")
    problem = checkpoint.fault(found)
    if problem:
        raise UserError(f"{found} is broken: {problem}.")
    return found


def _how_to_get_back(folder: RunFolder) -> str:
    newest = checkpoint.newest(folder.checkpoints)
    if newest is None:
        return f"To get it back: {_nothing_left(folder)}"
    return (
        "To get it back, start the same training command again: it writes the folder anew from the checkpoint of step "
        f"{checkpoint.step_of(newest)}. Merge and evaluate take that checkpoint by --step {checkpoint.step_of(newest)}."
    )


def _nothing_left(folder: RunFolder) -> str:
    return (
        f"no whole checkpoint is left in {folder.checkpoints} to write the final weights from. Put a copy of them "
        f"back, or train again from the start: delete {folder.path}, and give the same command."
    )
