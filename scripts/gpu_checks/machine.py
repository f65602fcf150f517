"""Check 1: driver, libraries and GPUs."""

import importlib.metadata
import shutil
import subprocess
from collections.abc import Iterator

import psutil
import torch
from torch import distributed as dist

from glora_llm.training.flops import peak_flops
from scripts.gpu_checks.context import Context
from scripts.gpu_checks.report import Row, absent, compared, information

LIBRARIES = ("torch", "deepspeed", "bitsandbytes", "transformers", "peft", "triton", "liger-kernel", "flash-attn")
GB = 1e9
FREE = 0.9  # share of a GPU's memory: less means that another process uses it


def check(context: Context) -> Iterator[Row]:
    """Compare what the driver, torch and bitsandbytes see."""
    yield information("versions", ", ".join(f"{name} {_version(name)}" for name in LIBRARIES))
    yield _bitsandbytes(context)
    if context.device.type == "cuda":
        yield from _gpus()
        yield from _links()
    else:
        yield absent("GPUs of the driver, NCCL and links between GPUs", "no GPU on this device")
        yield compared("collectives", "gloo", "gloo" if dist.is_gloo_available() else "none", dist.is_gloo_available())
        free = psutil.virtual_memory().available / GB
        yield compared("free memory", "above 1 GB", f"{free:.1f} GB", free > 1)
    dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
    peak = peak_flops(dtype, context.device)
    yield information("peak of one device", f"{peak / 1e12:.2f} TFLOP/s in {dtype}", peak_flops=peak)


def _bitsandbytes(context: Context) -> Row:
    from bitsandbytes.cextension import lib

    name = type(lib).__name__
    wanted = "CudaBNBNativeLibrary" if context.device.type == "cuda" else "a native library"
    return compared(
        "bitsandbytes' library", wanted, name, name == wanted or (context.is_rehearsal and "Native" in name)
    )


def _gpus() -> Iterator[Row]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield absent("GPUs that the driver sees", "nvidia-smi is not installed")
    else:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=True).stdout
        driver = sum(line.startswith("GPU ") for line in listed.splitlines())
        seen = torch.cuda.device_count()
        yield compared("GPUs that torch sees", f"{driver}, as the driver", str(seen), seen >= driver)
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        yield compared(
            f"GPU {number}, {name}: free memory", f"at least {FREE:.0%}", f"{free / GB:.1f} of {total / GB:.1f} GB",
            free >= FREE * total, total_memory=total,
        )  # fmt: skip
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    yield information("bfloat16", "in hardware" if native else "not in hardware: model.dtype auto is float32")


def _links() -> Iterator[Row]:
    count = torch.cuda.device_count()
    yield information("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    if count == 1:
        yield absent("links between GPUs", "one GPU")
        return
    direct = sum(torch.cuda.can_device_access_peer(0, other) for other in range(1, count))
    yield information("links between GPUs", f"GPU 0 reaches {direct} of {count - 1} others directly")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
