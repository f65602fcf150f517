"""DeepSpeed behind four calls: `train_step`, `score`, `state` and `restore`."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from glora_llm.schema import TrainingSection
from glora_llm.training.batch import Batch, to_device
from glora_llm.training.deepspeed_config import offloads, resolve_deepspeed_config, zero_stage
from glora_llm.training.loss_scale import LossScale
from glora_llm.training.optim import Trainable, make_optimizer, parameter_groups, set_lr


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Args:
        loss: mean -log p over the step's targets on all ranks, nats/token.
        targets: their number.
        grad_norm: global norm before clipping; inf when it was not finite.
        skipped: the step was not applied, because loss or gradient was not finite.
        overflow: skipped only because float16's loss scale was too large, which DeepSpeed then lowers.
    """

    loss: float
    targets: int
    grad_norm: float
    skipped: bool
    overflow: bool = False


class Engine:
    """A model under DeepSpeed.

    Args:
        objective: module that is a `training.objectives.Objective`.
        trainables: what is trained, in the same order on all ranks.
        settings: the recipe's training section.
        dtype: what the frozen weights are computed in.
        device: of this rank.
        penalty: a scalar that is added to the loss of every step; None: nothing.
    """

    def __init__(
        self,
        objective: nn.Module,
        trainables: Sequence[Trainable],
        settings: TrainingSection,
        dtype: torch.dtype,
        device: torch.device,
        penalty: Callable[[], Tensor] | None = None,
    ):
        import deepspeed

        from glora_llm.training.adam_state import AdamState

        self.world, self.rank, self.device = dist.get_world_size(), dist.get_rank(), device
        self.trainables, self.settings, self.penalty = list(trainables), settings, penalty
        self.objective: Any = objective
        config = resolve_deepspeed_config(settings, dtype, self.world)
        self.stage = zero_stage(config)
        groups = parameter_groups(self.trainables, settings.weight_decay)
        optimizer = make_optimizer(settings, groups, offloads(config))
        self.ds, *_ = deepspeed.initialize(
            model=objective, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.adam = AdamState(self.ds, self.stage)
        self.loss_scale = LossScale(self.ds.optimizer)
        self.applied = 0  # optimizer steps that were applied: Adam's own count

    def train_step(
        self, batches: Sequence[Batch], lr: float, before_micro_step: Callable[[int], None] = lambda _: None
    ) -> StepResult:
        """Run one optimizer step over this rank's micro batches.

        Args:
            before_micro_step: is called with the number of each micro batch (a supernet draws its paths then).

        The loss is the sum over targets divided by the number of targets of the whole step on all ranks, so it does
        not depend on how the step is cut into micro batches and ranks.
        """
        targets = self.total(sum(self.objective.targets(batch) for batch in batches))
        set_lr(self.adam.optimizer, lr)
        self.ds.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device="cpu")
        for index, batch in enumerate(batches):
            before_micro_step(index)
            loss = self.ds(**to_device(batch, self.device))
            share = loss * (self.world / targets)
            if self.penalty is not None and index == 0:
                share = share + self.penalty()
            self.ds.backward(share, scale_wrt_gas=False)
            loss_sum += loss.detach().double().cpu()
            if index + 1 < len(batches):
                self.ds.step()
        loss, scale_may_fall = self.total(loss_sum) / targets, self.loss_scale.can_fall
        skipped, norm = self._apply()
        self.applied += not skipped
        return StepResult(loss, int(targets), norm, skipped, skipped and scale_may_fall and math.isfinite(loss))

    def _apply(self) -> tuple[bool, float]:
        """Let DeepSpeed step unless a gradient is not finite; return (skipped, gradient norm)."""
        skipped_before = self.ds.skipped_steps
        norm = None
        if self.stage == 0:  # the other stages check the norm themselves
            grads = [item.parameter.grad for item in self.trainables if item.parameter.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads))
            if not math.isfinite(norm):
                for item in self.trainables:
                    item.parameter.grad = None
                self.ds.skipped_steps += 1
        self.ds.step()
        if norm is None:
            norm = float(self.ds.get_global_grad_norm() or 0.0)
        return self.ds.skipped_steps > skipped_before, norm

    @torch.no_grad()
    def score(self, batch: Batch) -> Any:
        """Return the objective's scores of one batch, in evaluation mode; all ranks must call it equally often."""
        with self._evaluating():
            return self.ds(**to_device(batch, self.device), score=True)

    def loss(self, batch: Batch) -> Tensor:
        """Return the objective's summed loss of one batch with its graph, in evaluation mode; for a search's slopes.

        Not what DeepSpeed's forward returns: that begins a step of training when it is differentiated.
        """
        inner: list[Tensor] = []

        def keep(module: Any, inputs: Any, loss: Tensor) -> Tensor:
            inner.append(loss)
            return loss.clone()

        handle = self.ds.module.register_forward_hook(keep)
        try:
            with self._evaluating():
                self.ds(**to_device(batch, self.device))
        finally:
            handle.remove()
        return inner[0]

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.ds.eval()
        try:
            yield
        finally:
            self.ds.train()

    def total(self, value: Any) -> Any:
        """Return the sum of a number over all ranks; all must call it."""
        tensor = torch.tensor([float(value)], dtype=torch.float64, device=self._reduce_device())
        dist.all_reduce(tensor)
        return float(tensor)

    def _reduce_device(self) -> torch.device:
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield master weights and Adam moments by name, on the CPU; all ranks must iterate together."""
        return self.adam.gather(self.trainables)

    def restore(self, tensors: dict[str, Tensor], applied: int, loss_scale: dict[str, Any]) -> None:
        """Set what `state` and `loss_scale.state` gave, after `applied` applied optimizer steps."""
        self.adam.restore(self.trainables, tensors, applied)
        self.applied = applied
        self.loss_scale.restore(loss_scale)

    def close(self) -> None:
        """Take DeepSpeed's hooks away: under ZeRO 1 and 2 they would keep the model alive beside the next one."""
        self.ds.destroy()

    def bytes_per_rank(self) -> int:
        """Return the bytes of parameters that this rank holds at rest (under ZeRO 3: its partitions)."""
        return sum(_held(p).numel() * _held(p).element_size() for p in self.ds.module.parameters())

    def gather_rows(self, values: Tensor) -> Tensor:
        """Sum a float64 table over ranks: each rank fills its own rows, the others are zero."""
        table = values.to(self._reduce_device())
        dist.all_reduce(table)
        return table.cpu()


def _held(parameter: Any) -> Tensor:
    partition = getattr(parameter, "ds_tensor", None)
    return parameter.data if partition is None else partition
