"""Master weights and Adam moments by parameter name, whatever the ZeRO stage, the rank count or the optimizer.

DeepSpeed keeps them in flat partitions of one rank each. Here they are read and written under the torch names
`exp_avg` and `exp_avg_sq` in float32; 8-bit states are dequantised on the way out and quantised again on the way in:
the same codes when the partition is the same, with scales equal to float32 rounding.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor
from torch import distributed as dist

from glora_llm.training.optim import Trainable

MOMENTS = ("exp_avg", "exp_avg_sq")
_BNB_STATES = {"exp_avg": "1", "exp_avg_sq": "2"}
BLOCK = 256  # 8-bit moments with one scale


class AdamState:
    """Reads and writes the state of one DeepSpeed engine.

    Args:
        engine: what `deepspeed.initialize` returned.
        stage: its ZeRO stage.
    """

    def __init__(self, engine: Any, stage: int):
        self.engine, self.stage = engine, stage
        self.wrapper = engine.optimizer
        self.optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self._allocate()

    def _allocate(self) -> None:
        """Make the states now, as zeros, so that they can be read and written before the first step too."""
        for group_index, group, flat in self._flat_partitions():
            if _is_bnb(self.optimizer):
                self.optimizer.init_state(group, flat, group_index, 0)  # type: ignore[attr-defined]
            else:
                zeros = {key: torch.zeros_like(flat, dtype=torch.float32) for key in MOMENTS}
                self.optimizer.state[flat].update(zeros, step=self._step_value(0))
        self._link()

    def gather(self, trainables: Sequence[Trainable]) -> Iterator[tuple[str, Tensor]]:
        """Yield (`master/NAME` or `exp_avg/NAME` ..., full float32 CPU tensor); all ranks must iterate together."""
        exposed = self._expose()
        for item in trainables:
            yield f"master/{item.name}", self._get(item, None)
            for key in MOMENTS:
                yield f"{key}/{item.name}", self._get(item, key)
        for state in exposed:
            for key in MOMENTS:
                del state[key]

    def restore(self, trainables: Sequence[Trainable], tensors: dict[str, Tensor], step: int) -> None:
        """Set what `gather` yielded, after `step` optimizer steps. All ranks must call it."""
        exposed = self._expose()
        for item in trainables:
            self._set(item, None, tensors[f"master/{item.name}"])
            for key in MOMENTS:
                self._set(item, key, tensors[f"{key}/{item.name}"])
        for _, _, flat in self._flat_partitions():
            self.optimizer.state[flat]["step"] = self._step_value(step)
        for state in exposed:
            for key, number in _BNB_STATES.items():
                _quantise_into(state, number, state.pop(key))

    def _step_value(self, step: int) -> Any:
        return torch.tensor(float(step)) if isinstance(self.optimizer, torch.optim.AdamW) else step

    def _flat_partitions(self) -> list[tuple[int, dict[str, Any], Tensor]]:
        """Return (group index, group, the tensor that the optimizer steps) of all partitions of this rank."""
        groups = self.optimizer.param_groups
        if self.stage == 3:
            owner = self.wrapper.sub_group_to_group_id
            flats = self.wrapper.fp32_partitioned_groups_flat
            return [(owner[i], groups[owner[i]], flat) for i, flat in enumerate(flats)]
        if self.stage in (1, 2):
            flats = self.wrapper.single_partition_of_fp32_groups
            return [(i, groups[i], flat) for i, flat in enumerate(flats)]
        return [(i, group, p) for i, group in enumerate(groups) for p in group["params"]]

    def _link(self) -> None:
        """Point the parameters' fragments at the (new) moments."""
        if self.stage in (1, 2):
            self.wrapper._hp_optimizer_states_linked = False
            self.wrapper._lazy_init_hp_params_optimizer_state()

    def _expose(self) -> list[dict[str, Any]]:
        """Put float32 moments beside 8-bit ones, so that all optimizers are read alike; return what to clean up."""
        if not _is_bnb(self.optimizer):
            return []
        exposed = []
        for _, _, flat in self._flat_partitions():
            state = self.optimizer.state[flat]
            for key, number in _BNB_STATES.items():
                state[key] = _dequantised(state, number)
            exposed.append(state)
        self._link()
        return exposed

    def _get(self, item: Trainable, key: str | None) -> Tensor:
        p = item.parameter
        if self.stage == 0:
            full = p.detach() if key is None else self.optimizer.state[p][key]
        else:
            full = safe_get_full_fp32_param(p) if key is None else safe_get_full_optimizer_state(p, key)
        return full.detach().float().cpu().clone().reshape(getattr(p, "ds_shape", p.shape))

    def _set(self, item: Trainable, key: str | None, value: Tensor) -> None:
        p = item.parameter
        if self.stage == 0:
            target = p.data if key is None else self.optimizer.state[p][key]
            target.copy_(value)
        elif self.stage == 3:
            mine = _partition(p, value).to(p.device)
            safe_set_local_fp32_param(p, mine) if key is None else safe_set_local_optimizer_state(p, mine, key)
        elif key is None:
            safe_set_full_fp32_param(p, value.to(p.device))
        else:
            safe_set_full_optimizer_state(p, value.to(p.device), key)


def _partition(parameter: Any, value: Tensor) -> Tensor:
    """Return this rank's part of a full tensor under ZeRO 3, zeros behind its end.

    DeepSpeed's own setter of full tensors fails where the elements do not divide by the ranks: a scalar, say.
    """
    group, size = parameter.ds_process_group, parameter.ds_tensor.ds_numel
    padded = torch.nn.functional.pad(value.flatten(), (0, size * dist.get_world_size(group) - value.numel()))
    return padded.narrow(0, size * dist.get_rank(group), size)


def _is_bnb(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.startswith("bitsandbytes")


def _dequantised(state: dict[str, Any], number: str) -> Tensor:
    """bitsandbytes keeps small tensors in float32 and others as blocks of 256 bytes with a scale each."""
    values: Tensor = state[f"state{number}"]
    if values.dtype != torch.uint8:
        return values.clone()
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(
        values, absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=BLOCK
    ).reshape(values.shape)


def _quantise_into(state: dict[str, Any], number: str, moment: Tensor) -> None:
    values: Tensor = state[f"state{number}"]
    if values.dtype != torch.uint8:
        values.copy_(moment)
        return
    code: Tensor = state[f"qmap{number}"]
    blocks = torch.nn.functional.pad(moment.flatten(), (0, -moment.numel() % BLOCK)).reshape(-1, BLOCK)
    # The code's ends are 1 and, for signed moments, about -0.993: the scale that made the extreme value, whichever end.
    up, down = blocks.amax(1).clamp(min=0), (-blocks.amin(1)).clamp(min=0)
    lowest = -float(code.min())
    scale = torch.where(up > down, up, down / lowest) if lowest > 0 else up
    middles = (code[1:] + code[:-1]) / 2
    shares = blocks / scale.clamp(min=torch.finfo(scale.dtype).tiny)[:, None]
    nearest = torch.bucketize(shares, middles).to(torch.uint8)
    values.copy_(nearest.flatten()[: moment.numel()].reshape(values.shape))
    state[f"absmax{number}"].copy_(scale)
