"""The processes of one launch: the process group, and this process's place in it."""

import datetime
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from glora_llm.errors import UserError
from glora_llm.launch.cpu_memory import keep_freed_memory
from glora_llm.launch.device import choose_device
from glora_llm.launch.extensions import leave_out_shared_buffers

# A process may download a model, or write and verify a large checkpoint, while the others wait for it. A failed
# process ends the launch much sooner (glora_llm/launch/failure.py).
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)


@dataclass(frozen=True)
class Processes:
    """The processes of a launch, as one of them sees them: its own number, how many there are, its own device."""

    process_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main_process(self) -> bool:
        """True for the first process: the one that prints and writes."""
        return self.process_rank == 0


def start() -> Processes:
    """Join the process group (of one, when started without a launcher) and take this process's device.

    Raises:
        UserError: when the machine has GPUs that torch cannot use, or fewer than it has processes.
    """
    import deepspeed

    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    device = choose_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        _share_the_cores()
        keep_freed_memory()
        leave_out_shared_buffers()
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=COLLECTIVE_TIMEOUT)
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def _share_the_cores() -> None:
    """Divide the cores among this machine's processes: more threads than cores slow every step down."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    local_sizes = (os.environ.get(name) for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    neighbours = int(next(size for size in local_sizes if size))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // neighbours))


def broadcast(value: Any, device: torch.device) -> Any:
    """Return the main process's value on all processes."""
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, device=device)
    return values[0]


def require_equal(facts: Mapping[str, str], world_size: int) -> None:
    """Check that all processes found the same inputs: machines may have caches and copies of their own.

    Args:
        facts: name of an input -> its digest.

    Raises:
        UserError: on all processes, naming the machines that differ from the main process's.
    """
    found: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(found, (socket.gethostname(), dict(facts)))
    main_machine, expected = found[0]
    for name, digest in expected.items():
        machines = sorted({machine for machine, theirs in found if theirs[name] != digest})
        if machines:
            raise UserError(
                f"The {name} of {', '.join(machines)} differs from that of {main_machine}. Give all machines the same "
                "files: a shared GLORA_CACHE and HF_HOME, or equal copies of data and models."
            )


def stop() -> None:
    """Leave the process group; DeepSpeed's own groups go with it, so that this process may join another."""
    if torch.distributed.is_initialized():
        import deepspeed

        deepspeed.comm.destroy_process_group()


def free_port() -> str:
    """Return a TCP port of this machine that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
