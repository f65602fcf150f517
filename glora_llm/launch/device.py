"""Choose the device that a process computes on: its GPU, or the CPU where there is none."""

import os
from pathlib import Path

import torch

from glora_llm.errors import UserError

NVIDIA_DEVICES = Path("/dev")  # the driver puts nvidia0, nvidia1 ... here, one a GPU
HIDDEN = {"", "-1", "NoDevFiles"}  # values of CUDA_VISIBLE_DEVICES that hide every GPU


def choose_device() -> torch.device:
    """Return this process's device: the GPU of its number on this machine, or the CPU.

    `DS_ACCELERATOR=cpu` chooses the CPU on a machine with GPUs.

    Raises:
        UserError: when the machine has GPUs that torch cannot use, or fewer than it has processes.
    """
    accelerator = os.environ.get("DS_ACCELERATOR")
    if accelerator not in (None, "cuda"):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        _require_no_gpu(accelerator)
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if count == 1:  # the launcher shows each process a GPU of its own (Slurm's --gpu-bind)
        return torch.device("cuda", 0)
    if local >= count:
        raise UserError(
            f"This machine has more processes than the {count} GPUs that torch sees. Start one process for each GPU, "
            "or make more GPUs visible (CUDA_VISIBLE_DEVICES)."
        )
    return torch.device("cuda", local)


def _require_no_gpu(accelerator: str | None) -> None:
    """Check that this is a machine without a GPU, or that its GPUs are hidden on purpose.

    Raises:
        UserError: when training would silently run on the CPU beside an idle GPU.
    """
    if accelerator is None and os.environ.get("CUDA_VISIBLE_DEVICES", "shown") in HIDDEN:
        return
    gpus = list(NVIDIA_DEVICES.glob("nvidia[0-9]*"))
    if not gpus and accelerator is None:
        return
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built for the CPU only"
    raise UserError(
        f"This machine has {len(gpus) or 'no'} GPUs, and torch {torch.__version__}, which {built}, can use none. "
        "Compare with the driver's version (nvidia-smi prints the newest CUDA that it takes): update the driver, or "
        "install a torch for it (https://pytorch.org/get-started/previous-versions); under Slurm, ask for GPUs. "
        "To compute on the CPU all the same, set DS_ACCELERATOR=cpu."
    )
