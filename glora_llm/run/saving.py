"""What a run leaves: checkpoints, and what was trained, as an adapter folder or as a whole model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from glora_llm.adapters.adalora import RankAllocation
from glora_llm.adapters.weights import save_adapter
from glora_llm.merge.whole_model import write_model
from glora_llm.plan.plan import Plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.training import checkpoint
from glora_llm.training.engine import Engine


@dataclass
class Saver:
    """Writes what was trained; one process writes, all give their parts.

    Args:
        model: what `adapters.inject` returned.
        allocation: AdaLoRA's, which keeps a state of its own; None for all else.
        first: this rank writes.
        facts: what trainer.json says beside the step: identity of the data, seconds so far.
    """

    plan: Plan
    folder: RunFolder
    model: Any
    allocation: RankAllocation | None
    first: bool
    facts: Callable[[], dict[str, Any]]

    def gathered(self, engine: Engine) -> dict[str, Tensor]:
        """Return master weights and moments on the first rank; the others give theirs, keep nothing, and get {}."""
        if self.first:
            return dict(engine.state())
        for _ in engine.state():
            pass
        return {}

    def checkpoint(self, engine: Engine, step: int) -> None:
        """Write a checkpoint; a failed write is reported and training goes on with the older ones."""
        tensors = self.gathered(engine)
        if not self.first:
            return
        training, keep = self.plan.recipe.training, self.plan.recipe.output.keep
        trainer = {
            "step": step,
            "applied": engine.applied,
            "loss_scale": engine.loss_scale.state(),
            "samples": step * training.global_batch,
            "seed": training.seed,
            **self.facts(),
        }
        is_full = self.plan.recipe.adapter.is_full  # its masters are the model
        try:
            checkpoint.write(
                self.folder.checkpoints,
                step,
                tensors,
                trainer,
                None if is_full else lambda path: self._write_adapter(tensors, path),
            )
            checkpoint.rotate(self.folder.checkpoints, keep)
        except OSError as error:
            print(
                f"checkpoint of step {step} was not written ({error}); training goes on. Free some disk space.",
                flush=True,
            )

    @property
    def written(self) -> bool:
        """Whether what was trained lies in the run folder already."""
        return self.folder.trained(self.plan.recipe).is_dir()

    def result(self, tensors: dict[str, Tensor]) -> None:
        """Write RUN/adapter, or RUN/model of a model that was trained as a whole."""
        if self.plan.recipe.adapter.is_full:
            write_model(self.plan, self.model.config, tensors, self.folder.model)
        else:
            self._write_adapter(tensors, self.folder.adapter)

    def _write_adapter(self, tensors: dict[str, Tensor], path: Path) -> None:
        base = self.plan.base
        save_adapter(self.model, tensors, path, str(base.folder) if base.name.startswith("embedded:") else base.name)
        if self.allocation:
            self.allocation.save(path)
