"""Master weights and Adam moments by parameter name, whatever the ZeRO stage, the process count or the optimizer.

DeepSpeed keeps them in flat partitions, one of each process. Here they are read and written under the torch names
`exp_avg` and `exp_avg_sq` in float32; 8-bit states are dequantised on the way out and quantised again on the way in:
the same codes when the partition is the same, with scales equal to float32 rounding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from glora_llm.training.optim import Trainable

MASTER, MOMENTS, MUON_MOMENTS = "master", ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)
BUCKET = 2**26  # elements that one collective gathers: 256 MB of float32
BLOCK = 256  # 8-bit moments with one scale
_BNB_STATES = {"exp_avg": "1", "exp_avg_sq": "2"}


@dataclass(frozen=True)
class Piece:
    """A run of elements of one parameter in the flat partition of one process.

    Args:
        parameter: whose elements they are.
        process: number, in its process group, of the process that holds them.
        at: where they begin in that process's partition.
        start: where they begin in the flattened parameter.
        length: their number.
    """

    parameter: nn.Parameter
    process: int
    at: int
    start: int
    length: int


@dataclass(frozen=True)
class Partition:
    """One tensor that the optimizer steps: this process's share of some parameters.

    Args:
        flat: float32 master weights.
        group: number of the optimizer's parameter group.
        pieces: of the partitions of all processes, which are equally long.
        process_group: of the processes that share the parameters; None: this process holds all of them.
    """

    flat: Tensor
    group: int
    pieces: Sequence[Piece]
    process_group: Any = None

    @property
    def process(self) -> int:
        """Number of this process among those that share the parameters."""
        return 0 if self.process_group is None else dist.get_rank(self.process_group)

    @property
    def processes(self) -> int:
        """Number of the processes that share the parameters."""
        return 1 if self.process_group is None else dist.get_world_size(self.process_group)


class AdamState:
    """Reads and writes the state of one DeepSpeed engine.

    Args:
        engine: what `deepspeed.initialize` returned.
        stage: its ZeRO stage.
        device: where collectives run.
    """

    def __init__(self, engine: Any, stage: int, device: torch.device):
        wrapper = engine.optimizer
        self.device = device
        self.optimizer: Any = getattr(wrapper, "optimizer", wrapper)
        if stage == 3:
            self.partitions = _partitions_of_stage_3(wrapper)
        elif stage > 0:
            self.partitions = _partitions_of_stages_1_and_2(wrapper)
        else:
            self.partitions = [
                Partition(p, number, [Piece(p, 0, 0, 0, p.numel())])
                for number, group in enumerate(self.optimizer.param_groups)
                for p in group["params"]
            ]
        self.is_bnb = type(self.optimizer).__module__.startswith("bitsandbytes")
        self._allocate()

    def _allocate(self) -> None:
        """Make the states now, as zeros, so that they can be read and written before the first step too."""
        for part in self.partitions:
            if self.is_bnb:
                self.optimizer.init_state(self.optimizer.param_groups[part.group], part.flat, part.group, 0)
            else:
                zeros = {key: torch.zeros_like(part.flat, dtype=torch.float32) for key in self.moments(part)}
                self.optimizer.state[part.flat].update(zeros)
                self.set_count(part, 0)

    def moments(self, part: Partition) -> tuple[str, ...]:
        """Return the names of what the optimizer keeps of a partition beside the master weights."""
        return MUON_MOMENTS if self.optimizer.param_groups[part.group].get("muon") else MOMENTS

    def gather(self, trainables: Sequence[Trainable]) -> Iterator[tuple[str, Tensor]]:
        """Yield (`master/NAME` or `exp_avg/NAME` ..., full float32 CPU tensor) on the first process, in no fixed order.

        All processes must iterate to the end; the others send their parts, copy nothing to the CPU and get nothing.
        """
        names = {id(item.parameter): item.name for item in trainables}
        where = torch.device("cpu") if not dist.is_initialized() or dist.get_rank() == 0 else None
        for part in self.partitions:
            for key in (MASTER, *self.moments(part)):
                for parameter, value in self.whole(part, self.read(part, key), where):
                    yield f"{key}/{names[id(parameter)]}", value

    def restore(self, trainables: Sequence[Trainable], tensors: dict[str, Tensor], step: int) -> None:
        """Set what `gather` yielded, after `step` optimizer steps. All processes must call it."""
        names = {id(item.parameter): item.name for item in trainables}
        for part in self.partitions:
            for key in (MASTER, *self.moments(part)):
                mine = torch.zeros(part.flat.numel(), dtype=torch.float32, device="cpu")  # what pads a partition is 0
                for piece in part.pieces:
                    if piece.process == part.process:
                        value = tensors[f"{key}/{names[id(piece.parameter)]}"].flatten()
                        mine[piece.at :][: piece.length] = value[piece.start :][: piece.length]
                self.write(part, key, mine.reshape(part.flat.shape))
            self.set_count(part, step)

    def set_count(self, part: Partition, steps: int) -> None:
        """Set the number of steps that Adam corrects the moments of a partition by; Muon needs none."""
        if self.moments(part) is MUON_MOMENTS:
            return
        self.optimizer.state[part.flat]["step"] = self._step_value(part, steps)

    def _step_value(self, part: Partition, step: int) -> Any:
        """Return a step counter as the optimizer makes it: torch's fused kernels read it on the device."""
        if not isinstance(self.optimizer, torch.optim.AdamW):
            return step
        group = self.optimizer.param_groups[part.group]
        on_device = group.get("fused") or group.get("capturable")
        return torch.tensor(float(step), dtype=torch.float32, device=part.flat.device if on_device else "cpu")

    def read(self, part: Partition, key: str) -> Tensor:
        """Return this process's part of the master weights or of a moment, flat, in float32."""
        if key == MASTER:
            return part.flat.detach().flatten().float()
        state = self.optimizer.state[part.flat]
        return (_dequantised(state, _BNB_STATES[key]) if self.is_bnb else state[key]).flatten().float()

    @torch.no_grad()
    def write(self, part: Partition, key: str, value: Tensor) -> None:
        """Set this process's part of the master weights or of a moment, in the partition's shape."""
        state = self.optimizer.state[part.flat]
        if key == MASTER:
            part.flat.copy_(value)
        elif self.is_bnb:
            _quantise_into(state, _BNB_STATES[key], value)
        else:
            state[key].copy_(value)

    def whole(self, part: Partition, mine: Tensor, where: torch.device | None) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield the parameters of a partition with whole values, on `where`; None: nothing on this process.

        Args:
            mine: this process's part, flat.
        """
        whole: dict[nn.Parameter, Tensor] = {}
        if where is not None:
            for piece in part.pieces:
                if piece.parameter not in whole:
                    shape = getattr(piece.parameter, "ds_shape", piece.parameter.shape)
                    whole[piece.parameter] = torch.empty(shape, dtype=torch.float32, device=where)
        length = max(1, BUCKET // part.processes)
        for start in range(0, len(mine), length):
            sent = mine[start : start + length].to(self.device)
            received = sent[None]
            if part.process_group is not None:
                received = sent.new_empty(part.processes, len(sent))
                dist.all_gather_into_tensor(received.view(-1), sent, group=part.process_group)
            if where is not None:
                received = received.to(where)
                for piece in part.pieces:
                    _copy_overlap(piece, received[piece.process], start, whole[piece.parameter].view(-1))
        yield from whole.items()


def _copy_overlap(piece: Piece, bucket: Tensor, start: int, target: Tensor) -> None:
    """Copy what a bucket, which begins at `start` of a partition, holds of a piece into the flattened parameter."""
    first, last = max(piece.at, start), min(piece.at + piece.length, start + len(bucket))
    if first < last:
        goal = piece.start + first - piece.at
        target[goal : goal + last - first] = bucket[first - start : last - start]


def _partitions_of_stages_1_and_2(wrapper: Any) -> list[Partition]:
    """The parameters of a group lie one behind the other, and each process holds an equal part of the whole."""
    partitions = []
    for number, flat in enumerate(wrapper.single_partition_of_fp32_groups):
        group, size, pieces = wrapper.real_dp_process_group[number], flat.numel(), []
        parameters, offsets = wrapper.round_robin_bit16_groups[number], wrapper.round_robin_bit16_offsets[number]
        for parameter, offset in zip(parameters, offsets, strict=True):
            for process in range(dist.get_world_size(group)):
                first = max(offset, process * size)
                length = min(offset + parameter.numel(), (process + 1) * size) - first
                if length > 0:
                    pieces.append(Piece(parameter, process, first - process * size, first - offset, length))
        partitions.append(Partition(flat, number, pieces, group))
    return partitions


def _partitions_of_stage_3(wrapper: Any) -> list[Partition]:
    """Each parameter is cut into equal parts, and a process's parts of a group lie one behind the other."""
    partitions = []
    for number, flat in enumerate(wrapper.fp32_partitioned_groups_flat):
        parameters, at, pieces = wrapper.fp16_groups[number], 0, []
        for parameter in parameters:
            size = parameter.partition_numel()
            for process in range(dist.get_world_size(parameter.ds_process_group)):
                length = min(size, parameter.ds_numel - process * size)
                if length > 0:
                    pieces.append(Piece(parameter, process, at, process * size, length))
            at += size
        owner = wrapper.sub_group_to_group_id[number]
        partitions.append(Partition(flat, owner, pieces, parameters[0].ds_process_group))
    return partitions


def _dequantised(state: dict[str, Any], number: str) -> Tensor:
    """Return a moment of bitsandbytes in float32, where its scales are: a paged state is a CPU tensor itself.

    Small tensors are kept in float32, others as blocks of 256 bytes with a scale each.
    """
    values: Tensor = state[f"state{number}"]
    if values.dtype != torch.uint8:
        return values.clone()
    from bitsandbytes.functional import dequantize_blockwise

    absmax, code = state[f"absmax{number}"], state[f"qmap{number}"]
    moment = dequantize_blockwise(values.to(absmax.device), absmax=absmax, code=code, blocksize=BLOCK)
    return moment.reshape(values.shape)


def _quantise_into(state: dict[str, Any], number: str, moment: Tensor) -> None:
    """Set a moment of bitsandbytes from float32 values."""
    values: Tensor = state[f"state{number}"]
    if values.dtype != torch.uint8:
        values.copy_(moment)
        return
    code, absmax = state[f"qmap{number}"], state[f"absmax{number}"]
    moment, tiny = moment.to(absmax.device), torch.finfo(absmax.dtype).tiny
    blocks = torch.nn.functional.pad(moment.flatten(), (0, -moment.numel() % BLOCK)).reshape(-1, BLOCK)
    # The code's ends are 1 and, for signed moments, about -0.993: the scale that made the extreme value, whichever end.
    up, down = blocks.amax(1).clamp(min=0), (-blocks.amin(1)).clamp(min=0)
    lowest = (-code.min()).clamp(min=tiny)
    scale = torch.where(up > down, up, down / lowest)
    middles = (code[1:] + code[:-1]) / 2
    shares = blocks / scale.clamp(min=tiny)[:, None]
    nearest = torch.bucketize(shares, middles).to(torch.uint8)
    values.copy_(nearest.flatten()[: moment.numel()].reshape(values.shape))
    absmax.copy_(scale)
