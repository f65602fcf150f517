"""DeepSpeed behind four calls: `train_step`, `score`, `state` and `restore`."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from glora_llm.errors import UserError
from glora_llm.failpoints import reach
from glora_llm.schema import TrainingSection
from glora_llm.training.adam_state import AdamState
from glora_llm.training.batch import Batch, to_device
from glora_llm.training.deepspeed_config import DeepSpeedConfig
from glora_llm.training.end_vote import EndVote
from glora_llm.training.loss_scale import LossScale
from glora_llm.training.muon import MuonAdamW
from glora_llm.training.optim import Trainable, make_optimizer, parameter_groups, set_lr
from glora_llm.training.penalty import GradientOf, Penalty
from glora_llm.training.sharding import Held, forget_models, held, is_divided, prepare_rest
from glora_llm.training.whole_state import WholeState


@dataclass(frozen=True)
class StepResult:
    """The outcome of one optimizer step.

    Args:
        loss: mean -log p over the step's targets on all processes, nats/token.
        targets: their number.
        grad_norm: global norm before clipping; inf when it was not finite.
        skipped: the step was not applied, because loss or gradient was not finite.
        overflow: skipped only because float16's loss scale was too large, which DeepSpeed then lowers.
        told_to_end: some process was told to end before the step was over.
        abandoned: nothing was applied, because that was known between two micro batches.
    """

    loss: float
    targets: int
    grad_norm: float
    skipped: bool
    overflow: bool = False
    told_to_end: bool = False
    abandoned: bool = False


class Engine:
    """A model under DeepSpeed.

    Args:
        objective: module that is a `training.objectives.Objective`.
        trainables: the trained parameters, in the same order on all processes.
        settings: the recipe's training section.
        config: DeepSpeed's, resolved for this launch.
        device: of this process.
        penalty: the gradient of a scalar that is added to the loss of every step, by parameter; None: nothing.

    Raises:
        UserError: when DeepSpeed changed the dtype of a buffer.
    """

    def __init__(
        self,
        objective: nn.Module,
        trainables: Sequence[Trainable],
        settings: TrainingSection,
        config: DeepSpeedConfig,
        device: torch.device,
        penalty: Mapping[nn.Parameter, GradientOf] | None = None,
    ):
        import deepspeed

        self.world_size, self.process_rank, self.device = dist.get_world_size(), dist.get_rank(), device
        self.trainables, self.settings = list(trainables), settings
        self.objective: Any = objective
        self.stage = config.stage
        groups = parameter_groups(self.trainables, settings.weight_decay)
        optimizer = make_optimizer(settings, groups, config.offloads)
        if any(is_divided(parameter) for parameter in objective.parameters()):
            prepare_rest(objective, config.values, device)
        dtypes = {name: buffer.dtype for name, buffer in objective.named_buffers()}
        self.ds, *_ = deepspeed.initialize(
            model=objective, optimizer=optimizer, config=config.values, dist_init_required=False
        )
        _require_dtypes(objective, dtypes)
        self.adam = AdamState(self.ds, self.stage, device)
        if isinstance(optimizer, MuonAdamW):
            optimizer.bind(self.adam.partitions)
        self.loss_scale = LossScale(self.ds.optimizer)
        self.penalty = Penalty(penalty or {}, lambda: float(getattr(self.ds.optimizer, "loss_scale", 1.0)))
        self.whole = WholeState(self.adam, self.trainables)
        self.after_step: Callable[[bool], None] = lambda _skipped: None  # of an adapter method with a state
        self.end_vote = EndVote()
        self.applied = 0  # optimizer steps that were applied: Adam's own count
        self.tf32_before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = settings.tf32

    def train_step(
        self,
        batches: Sequence[Batch],
        lr: float,
        before_micro_step: Callable[[int], None] = lambda _: None,
        told_to_end: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """Run one optimizer step over this process's micro batches.

        The loss is the sum over targets divided by the number of targets of the whole step on all processes, so it
        does not depend on how the step is cut into micro batches and processes. The host reads the device once, after
        the last micro batch: until then it only launches work.

        Args:
            before_micro_step: is called with the number that each micro batch has among those of the step on all
                processes, in the order of its samples.
            told_to_end: whether this process was told to end; asked at every micro batch, for all processes. The rest
                of the step is then left out.
        """
        targets = self._summed(sum(self.objective.targets(batch) for batch in batches))
        scale = (torch.full_like(targets, self.world_size) / targets).float()
        set_lr(self.adam.optimizer, lr)
        self.ds.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, batch in enumerate(batches):
            if index and self.end_vote.outcome():
                return StepResult(math.nan, 0, math.nan, skipped=False, told_to_end=True, abandoned=True)
            if index + 1 < len(batches):
                self.end_vote.cast(told_to_end())
            before_micro_step(index * self.world_size + self.process_rank)
            reach("step.before_forward")
            loss = self.ds(**to_device(batch, self.device))
            self.penalty.is_due = index == 0
            reach("step.before_backward")
            self.ds.backward(loss * scale, scale_wrt_gas=False)
            loss_sum += loss.detach()
            if index + 1 < len(batches):
                self.ds.step()
                reach("step.between_micro_batches")
        scale_may_fall = self.loss_scale.can_fall
        reach("step.before_optimizer")
        skipped, norm = self._apply()
        self.after_step(skipped)
        reach("step.after_optimizer")
        self.applied += not skipped
        told = torch.full_like(targets, told_to_end())
        ended = torch.stack([loss_sum, told])
        dist.all_reduce(ended)
        total, stops, count = torch.cat([ended, targets[None]]).tolist()
        loss = total / count
        overflow = skipped and scale_may_fall and math.isfinite(loss)
        return StepResult(loss, int(count), norm, skipped, overflow, bool(stops))

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
                self.ds.clip_fp32_gradients = lambda: None  # it takes for granted that there is a gradient
        try:
            self.ds.step()
        finally:
            vars(self.ds).pop("clip_fp32_gradients", None)
        if norm is None:
            norm = float(self.ds.get_global_grad_norm() or 0.0)
        return self.ds.skipped_steps > skipped_before, norm

    @torch.no_grad()
    def score(self, batch: Batch) -> Any:
        """Return the objective's scores of one batch, in evaluation mode; all processes must call it equally often."""
        with self._evaluating():
            return self.ds(**to_device(batch, self.device), score=True)

    def any_told_to_end(self, told_to_end: bool) -> bool:
        """Tell whether any process was told to end; all processes must call it equally often."""
        self.end_vote.cast(told_to_end)
        return self.end_vote.outcome()

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

    def release(self) -> None:
        """Divide again what the gradients of some tensors alone left whole under ZeRO 3; all processes together."""
        if self.stage == 3:
            self.ds.empty_partition_cache()

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.ds.eval()
        try:
            yield
        finally:
            self.ds.train()

    def _summed(self, value: float) -> Tensor:
        """Return the sum of a number over all processes, on the device; `torch.tensor` would wait for the copy."""
        tensor = torch.full((), value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield master weights and Adam moments by name, on the CPU of the first process, nothing on the others.

        All processes must iterate to the end, together.
        """
        return self.adam.gather(self.trainables)

    def restore(self, tensors: dict[str, Tensor], applied: int, loss_scale: dict[str, Any]) -> None:
        """Set what `state` and `loss_scale.state_dict` gave, after `applied` applied optimizer steps."""
        self.adam.restore(self.trainables, tensors, applied)
        self.applied = applied
        self.loss_scale.load_state_dict(loss_scale)

    def close(self) -> None:
        """Take away what DeepSpeed holds of the model, which would otherwise stay in memory beside the next one.

        Under ZeRO 1 and 2 these are hooks, under ZeRO 3 also what the library keeps of every model for good.
        """
        self.ds.destroy()
        self.end_vote.close()
        if self.stage == 3:
            forget_models()
        torch.backends.cuda.matmul.allow_tf32 = self.tf32_before

    def held(self) -> Held:
        """Return the bytes of the model that this process holds at rest (under ZeRO 3: its parts)."""
        return held(self.ds.module)

    def gather_rows(self, values: Tensor) -> Tensor:
        """Sum a float64 table over processes: each fills its own rows, the others are zero."""
        table = values.to(self.device)
        dist.all_reduce(table)
        return table.cpu()


def _require_dtypes(module: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Check that every buffer has the dtype it had: rotary angles rounded to bfloat16 are wrong beyond position 256."""
    for name, buffer in module.named_buffers():
        if buffer.dtype != dtypes.get(name, buffer.dtype):
            raise UserError(
                f"DeepSpeed cast the buffer {name} from {dtypes[name]} to {buffer.dtype}, which changes what the model "
                "computes. Take data_types.buffer_dtype out of the DeepSpeed configuration."
            )
