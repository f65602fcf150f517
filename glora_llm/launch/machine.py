"""The environment of a result: versions of the packages, the commit of this one, and the hardware."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from glora_llm import __version__

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "numpy", "safetensors")
GIT_SECONDS = 10.0  # on a slow disk it may take long to tell whether files were changed


def versions() -> dict[str, str]:
    """Return package -> version, of Python and of those that are installed."""
    found = {"python": platform.python_version(), "glora_llm": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the commit of the checkout that this package runs from, with `-dirty` where files were changed.

    None: it was installed from a wheel, or there is no git.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # or it would be the commit of whatever repository a .venv lies in
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def hardware(device: str) -> dict[str, Any]:
    """Describe this machine.

    Args:
        device: what is computed on, `cpu` or `cuda`.

    Returns:
        device, gpus (a name each), cpu (its name), cores, memory_bytes, system.
    """
    gpus: list[str] = []
    if device == "cuda":
        import torch

        gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "device": device,
        "gpus": gpus,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
