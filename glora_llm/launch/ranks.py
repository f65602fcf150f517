"""The processes of one launch: the process group, and this process's place in it."""

import contextlib
import datetime
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
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
MEETING_SECONDS = 900.0  # how long a process waits for the others at the start: they load the same libraries


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
        UserError: when the machine has GPUs that torch cannot use, or fewer than it has processes, when another
            program listens at the port, and for WORLD_SIZE without RANK.
    """
    import deepspeed

    if "RANK" not in os.environ:
        if os.environ.get("WORLD_SIZE", "1") != "1":  # a dry run may be asked about that many; a run is one process
            raise UserError(
                f"The environment says WORLD_SIZE={os.environ['WORLD_SIZE']}, and RANK is not set: a launcher "
                "(deepspeed, torchrun) sets both. For one process, unset WORLD_SIZE."
            )
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    device = choose_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        _share_the_cores()
        keep_freed_memory()
        leave_out_shared_buffers()
    backend = "nccl" if device.type == "cuda" else "gloo"
    with _meeting():
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=COLLECTIVE_TIMEOUT)
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
    """End this process, with exit code 2 and one message, when the others of its launch do not come.

    torch waits in native code, which neither Ctrl-C nor an exception reaches: a timer ends the wait.

    Raises:
        UserError: when the process that others connect to cannot listen at its port.
    """
    place = f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}"
    launch = f"RANK={os.environ['RANK']} of WORLD_SIZE={os.environ['WORLD_SIZE']} processes, {place}"

    def give_up() -> None:
        print(
            f"error: this is {launch}, and not all of them came in {MEETING_SECONDS:g} s. Start every one of them, by "
            "a launcher (deepspeed, torchrun), and let their machines reach that address; for one process, unset RANK "
            "and WORLD_SIZE.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(MEETING_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except torch.distributed.DistNetworkError as error:
        raise UserError(
            f"This is {launch}, and the first of them cannot be met there: {str(error).splitlines()[0]} Choose a free "
            "MASTER_PORT, and an address of the machine of RANK=0."
        ) from error
    finally:
        timer.cancel()


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
