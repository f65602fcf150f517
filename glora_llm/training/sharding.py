"""A model under ZeRO 3 beside what DeepSpeed does itself: what is divided, and what each process holds of it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


def is_divided(parameter: Tensor) -> bool:
    """Tell whether DeepSpeed has divided a parameter over the processes."""
    return hasattr(parameter, "ds_id")


def element_count(parameter: Tensor) -> int:
    """Return the number of elements of a parameter, divided or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter, divided or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@torch.no_grad()
def set_whole(parameter: nn.Parameter, values: Tensor) -> None:
    """Set a parameter, divided or not, to the values of the main process; all processes must call it together."""
    if not is_divided(parameter):
        parameter.copy_(values)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(values)


@torch.no_grad()
def set_everywhere(parameter: nn.Parameter, values: Tensor) -> None:
    """Set a parameter, divided or not, to whole values that all processes hold alike; nothing is sent."""
    if not is_divided(parameter):
        parameter.copy_(values)
        return
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    divided: Any = parameter
    size, process = divided.partition_numel(), dist.get_rank(divided.ds_process_group)
    mine = values.flatten()[process * size :][:size]
    divided.ds_tensor[: len(mine)].copy_(mine)
    if divided.ds_status == ZeroParamStatus.AVAILABLE:  # small ones stay whole between steps
        parameter.copy_(values)


def forget_models() -> None:
    """Empty the two places in which DeepSpeed's ZeRO 3 keeps every model of the process, after its engine has ended.

    They are a list of the modules whose forward pass is under way, which begins with the model itself, and the cache
    of a method, whose keys are modules.
    """
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK.clear()
    for method in vars(parameter_offload.PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():  # the cache lies below a decorator
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


def prepare_rest(module: nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """Move and cast what is not divided, such as adapters.

    `deepspeed.initialize` does that itself, but not for a model any parameter of which is divided already.

    Args:
        config: what `deepspeed.initialize` will get.
    """
    halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((half for key, half in halves.items() if config[key]["enabled"]), None)
    for parameter in module.parameters():
        if not is_divided(parameter):
            parameter.data = parameter.data.to(device, dtype if parameter.is_floating_point() else None)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


@dataclass(frozen=True)
class Held:
    """Bytes of a model on one process at rest, between two steps.

    Args:
        parameters: of the parts of divided parameters, and of all others.
        scales: of what 4-bit and 8-bit weights are unpacked by, which is never divided.
        total: of all parameters of the model, undivided.
    """

    parameters: int
    scales: int
    total: int

    @property
    def bytes(self) -> int:
        """All that this process holds."""
        return self.parameters + self.scales


def held(module: nn.Module) -> Held:
    """Count the bytes of a model on this process."""
    parts = total = 0
    scales: dict[int, int] = {}
    for parameter in module.parameters():
        own = _parts(parameter)
        parts += sum(map(_bytes, own))
        total += element_count(parameter) * parameter.element_size()
        scales |= {tensor.data_ptr(): _bytes(tensor) for tensor in _scales(parameter)}  # codebooks are shared
    return Held(parts, sum(scales.values()), total)


def undivided(found: Held, world_size: int) -> str:
    """Return a warning when the processes together hold clearly more than the model once; empty: they do not."""
    together = found.parameters * world_size
    if together <= 1.1 * found.total:
        return ""
    return (
        f"ZeRO 3 has not divided the model by {world_size}: its parameters take {found.total / 1e9:.2f} GB, and each "
        f"process holds {found.parameters / 1e9:.2f} GB of them"
    )


def _parts(parameter: Any) -> list[Tensor]:
    if not is_divided(parameter):
        return [parameter.data]
    second = parameter.ds_secondary_tensor  # a copy of the model a machine, with zero_hpz_partition_size
    return [parameter.ds_tensor] if second is None else [parameter.ds_tensor, second]


def _scales(parameter: Any) -> list[Tensor]:
    """Return the tensors beside a quantised weight: bitsandbytes' QuantState of 4-bit blocks, SCB of int8 rows."""
    state = getattr(parameter, "quant_state", None)
    states = [] if state is None else [state, *([state.state2] if state.nested else [])]
    found = [tensor for one in states for tensor in (one.absmax, one.code)]
    rows = getattr(parameter, "SCB", None)
    return found if rows is None else [*found, rows]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
