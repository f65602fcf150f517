"""Time a step of GLoRA on a convolution, by both ways to compute it, against PEFT's LoRA of the same rank.

    python scripts/bench_conv.py [--rounds N]

All ways take turns within a round; the median time of forward and backward is printed, in milliseconds, on one thread.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Conv2d as LoraConv
from torch import Tensor, nn

from glora_llm.glora import GLoRAConfig, conv
from glora_llm.glora.path import make_path

RANK = 8  # of A and of B; LoRA has 16
# name -> layer, shape of its input, whether that has a gradient
CASES: dict[str, tuple[nn.Conv2d, tuple[int, ...], bool]] = {
    "patches of ViT-B/16, 8 images of 224 x 224": (nn.Conv2d(3, 768, 16, 16), (8, 3, 224, 224), False),
    "3 x 3, 128 to 128 channels, 8 x 28 x 28": (nn.Conv2d(128, 128, 3, padding=1, bias=False), (8, 128, 28, 28), True),
    "1 x 1, 256 to 64 channels, 8 x 56 x 56": (nn.Conv2d(256, 64, 1, bias=False), (8, 256, 56, 56), True),
    "3 x 3, 64 to 64 channels in 4 groups, 8 x 28 x 28": (
        nn.Conv2d(64, 64, 3, padding=1, bias=False, groups=4),
        (8, 64, 28, 28),
        True,
    ),
}


def glora(base: nn.Conv2d) -> nn.Module:
    """Return the default slots on a convolution."""
    layer = conv.GLoRAConv(base)
    path = make_path({"A": "lora", "B": "lora", "C": "vector", "E": "vector"}, RANK, 2.0 * RANK)
    layer.update_layer("default", GLoRAConfig(rank=RANK), path)
    layer.set_adapter("default")
    return layer


def seconds(layer: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return the time of one forward and backward pass."""
    began = time.perf_counter()
    y = layer(x)
    y.backward(torch.ones_like(y))
    return time.perf_counter() - began


def measure(base: nn.Conv2d, shape: tuple[int, ...], needs_gradient: bool, rounds: int) -> dict[str, float]:
    """Return the median time of each way, ms."""
    base.requires_grad_(False)
    x = torch.randn(shape, requires_grad=needs_gradient)
    layers: dict[str, tuple[nn.Module, int]] = {
        "as chosen": (glora(base), conv.THIN_COST),
        "thin products": (glora(base), 0),
        "changed weight": (glora(base), 10**9),
    }
    if base.groups == 1:
        lora = LoraConv(copy.deepcopy(base), "default", LoraConfig(r=2 * RANK), r=2 * RANK, lora_alpha=4 * RANK)
        layers["PEFT LoRA"] = (lora, conv.THIN_COST)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(rounds):
        for name, (layer, conv.THIN_COST) in layers.items():
            times[name].append(seconds(layer, x))
    conv.THIN_COST = layers["as chosen"][1]
    return {name: 1000 * statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Print a row for each layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for name, case in CASES.items():
        found = measure(*case, rounds)
        print(f"{name}: " + ", ".join(f"{way} {value:.1f}" for way, value in found.items()), "ms", flush=True)


if __name__ == "__main__":
    main()
