"""Write checkpoints, and the final weights as an adapter folder or a whole model."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from glora_llm.adapters.stateful import StatefulMethod, save_state
from glora_llm.adapters.weights import save_adapter
from glora_llm.atomic import whole_folder, write_text
from glora_llm.errors import CheckFailed
from glora_llm.failpoints import reach
from glora_llm.merge.whole_model import write_model
from glora_llm.plan.plan import Plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.plan.trained_weights import final_fault
from glora_llm.run.resumed import layout
from glora_llm.training import checkpoint
from glora_llm.training.best import Best
from glora_llm.training.engine import Engine

SECONDS_BETWEEN_ATTEMPTS = (5, 15, 40)  # to write what a run cannot do without


@dataclass(frozen=True)
class Clock:
    """The time that a run has taken, over all its launches.

    Args:
        began: seconds since the epoch at which this launch began.
        earlier: seconds of the launches before, up to the checkpoint that this one goes on from.
    """

    began: float
    earlier: float = 0.0

    def seconds(self) -> float:
        """Return the seconds of this run so far."""
        return self.earlier + time.time() - self.began


def write_for_people(path: Path, text: str) -> None:
    """Write a small file that no result depends on; after an error of the disk warn and go on without it."""
    try:
        write_text(path, text)
    except OSError as error:
        print(f"warning: {path} was not written ({error}); free some space", flush=True)


def insist(write: Callable[[], None], path: Path, checkpoints: Path) -> None:
    """Write what a run cannot do without; after an error of the disk warn, wait and try again.

    Args:
        write: writes it, whole or not at all.
        path: what it writes.
        checkpoints: of the run.

    Raises:
        CheckFailed: when no attempt succeeds.
    """
    for seconds in (*SECONDS_BETWEEN_ATTEMPTS, None):
        try:
            write()
            return
        except OSError as error:
            if seconds is None:
                newest = checkpoint.newest(checkpoints)
                kept = f"The checkpoint of step {checkpoint.step_of(newest)}" if newest else "No checkpoint"
                raise CheckFailed(
                    f"{path} cannot be written: {error}. {kept} is kept; free some space on this disk, or mend it, and "
                    "give the same command again: it writes what is missing."
                ) from error
            print(f"warning: {path} was not written ({error}); free some space. Next try in {seconds} s", flush=True)
        time.sleep(seconds)


@dataclass(frozen=True)
class Saver:
    """Writes the trained weights; the first process writes, the others give their parts.

    Args:
        plan: of the run.
        folder: of the run.
        model: the model that `adapters.inject` returned.
        method: the adapter method's own state, if it has one.
        is_main_process: this process writes.
        data_digest: SHA-256 of the training rows, which a resumed run must find again.
        clock: of the run.
        best: of the validations.
    """

    plan: Plan
    folder: RunFolder
    model: Any
    method: StatefulMethod | None
    is_main_process: bool
    data_digest: str
    clock: Clock
    best: Best

    def gather(self, engine: Engine) -> dict[str, Tensor]:
        """Return master weights and moments on the first process; the others give theirs, keep nothing, and get {}."""
        if self.is_main_process:
            return dict(engine.state())
        for _ in engine.state():
            pass
        return {}

    def save_checkpoint(self, engine: Engine, step: int) -> None:
        """Write a checkpoint; a failed write is reported and training goes on with the older ones."""
        reach("checkpoint.before_gather")
        tensors = self.gather(engine)
        if not self.is_main_process:
            return
        root, is_full = self.folder.checkpoints, self.plan.recipe.adapter.is_full
        write_adapter = None if is_full else lambda path: self._write_adapter(tensors, path)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        size += 0 if is_full else size // 3  # the adapter beside master weights and two moments
        try:
            checkpoint.require_room(root, size)
            checkpoint.write(root, step, tensors, self._trainer_state(engine, step), write_adapter)
            self.best.written(step)
            checkpoint.rotate(root, self.plan.recipe.output.keep)
        except OSError as error:
            kept = ", ".join(str(checkpoint.step_of(folder)) for folder in checkpoint.checkpoints(root))
            print(
                f"warning: checkpoint of step {step} was not written ({error}); training goes on, and the next "
                f"checkpoint tries again. Kept: {f'those of steps {kept}' if kept else 'none so far'}. "
                f"Free {checkpoint.megabytes(size)} on the disk of {root}, or mend it.",
                flush=True,
            )
            return
        reach("checkpoint.after_rotation")

    def _trainer_state(self, engine: Engine, step: int) -> dict[str, Any]:
        """Return the content of trainer.json."""
        training = self.plan.recipe.training
        return {
            "step": step,
            "applied": engine.applied,
            "loss_scale": engine.loss_scale.state_dict(),
            "samples": step * training.global_batch,
            "seed": training.seed,
            "layout": layout(self.plan.recipe, engine.stage, engine.world_size),
            "data_digest": self.data_digest,
            "seconds": self.clock.seconds(),
            **({"best": self.best.state_dict(step)} if self.best.watches else {}),
        }

    @property
    def is_written(self) -> bool:
        """Tell whether the final weights are in the run folder already, and whole."""
        return final_fault(self.folder, self.plan.recipe) is None

    def save_result(self, tensors: dict[str, Tensor]) -> None:
        """Write the final weights: RUN/adapter, or RUN/model of a model that was trained as a whole.

        Raises:
            CheckFailed: when the disk takes them at no attempt.
        """
        reach("result.before")
        folder = self.folder.trained(self.plan.recipe)
        insist(lambda: self._write_result(tensors), folder, self.folder.checkpoints)
        reach("result.after")

    def _write_result(self, tensors: dict[str, Tensor]) -> None:
        with checkpoint.disk_errors(self.folder.path):
            if self.plan.recipe.adapter.is_full:
                write_model(self.plan, self.model.config, tensors, self.folder.model)
                return
            with whole_folder(self.folder.adapter) as place:
                self._write_adapter(tensors, place)
                reach("result.after_weights")
                checkpoint.write_manifest(place)

    def _write_adapter(self, tensors: dict[str, Tensor], path: Path) -> None:
        base = self.plan.base
        save_adapter(self.model, tensors, path, str(base.folder) if base.name.startswith("embedded:") else base.name)
        if self.method is not None:
            save_state(self.method, path)
