"""A training step of a 12-layer ViT: VLoRA against the dense model, and against the released package's parametrisation.

  python scripts/bench_vlora.py [--rounds 5] [--images 64] [--width 768] [--out FILE.md]

ViT-B's shape on 32 x 32 images in patches of 4 (65 tokens an image, so 64 images are 4,160 tokens), k 4, r 8. A step is
this trainer's own: forward, backward, clipping and AdamW under DeepSpeed ZeRO 1 on one rank. Times are medians of one
interleaved run, ratios medians of the ratios within a round. Memory is the peak over two steps in a process of its own:
allocated on a GPU; on a CPU the resident set, where glibc gives back what is freed at once. `released` is what vlora
0.1 computes (star, the base detached outside the first layer, W = base + B A by plain autograd) on the same parameters.
Exits with 1 when a bound is not kept.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from glora_llm.launch import ranks
from glora_llm.launch.device import choose_device
from glora_llm.launch.quiet import quiet_libraries
from glora_llm.report.timing import Times, interleaved, ratio
from glora_llm.schema import TrainingSection
from glora_llm.training.deepspeed_config import resolve_deepspeed_config
from glora_llm.training.engine import Engine
from glora_llm.training.image_objective import ImageObjective
from glora_llm.training.loop import peak_memory_gb
from glora_llm.training.optim import Trainable
from glora_llm.vlora import VLoRAConfig, make_compounds
from glora_llm.vlora.layer import VLoRALinear, vlora_layers

STAR = {"topology": "star", "base_gradient": "first", "start": "kaiming"}
FORMS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "chain": {},
    "star, base from the first layer": STAR,
    "released": STAR,
}
FORWARD_BACKWARD, STEP, PARAMETERS = 1.05, 1.00, 0.30  # x dense, at most
MIDDLE = (0.5, 0.5, 0.5)
ADAM_BYTES = 8  # two float32 moments a parameter
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc maps each tensor by itself, so the resident set is what is live


class Measured(NamedTuple):
    """One form: trained parameters, those of its linears, and peak memory in GB."""

    parameters: int
    linears: int
    gb: float


def main() -> int:
    """Measure, print the table, compare with the bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--width", type=int, default=768, help="a multiple of 64")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet_libraries()
    if arguments.memory_of:
        ranks.start()
        model = make_model(arguments.memory_of, arguments.width)
        step = make_step(model, arguments.images)
        for _ in range(2):
            step()
        linears = [module for module in layers_of(model).modules() if isinstance(module, nn.Linear)]
        counts = [sum(p.numel() for p in m.parameters(recurse=False)) for m in linears]
        total = sum(p.numel() for p in model.parameters())
        print(json.dumps(Measured(total, sum(counts), peak_memory_gb(choose_device()))))
        return 0
    measured = {name: measure(name, arguments) for name in FORMS}
    ranks.start()
    passes, steps = time_all(arguments)
    lines, good = table(passes, steps, measured)
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(not good)


def layers_of(model: Any) -> nn.ModuleList:
    """Return the encoder's layers."""
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 12]
    return found[0]


def make_model(name: str, width: int) -> Any:
    """Return the ViT in one form."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64, image_size=32, patch_size=4
    )
    model: Any = ViTForImageClassification(config)
    keys = FORMS[name]
    if keys is not None:
        make_compounds(model, list(layers_of(model)), VLoRAConfig(**keys), torch.Generator().manual_seed(0))
    if name == "released":
        for layer in vlora_layers(model).values():
            layer.forward = released(layer)  # type: ignore[assignment, method-assign]
    return model.to(choose_device()).train()


def released(layer: VLoRALinear) -> Callable[[Tensor], Tensor]:
    """Return the forward pass of vlora 0.1 for a layer that is not its compound's first."""

    def forward(x: Tensor) -> Tensor:
        parts = layer.read()
        return nn.functional.linear(x, parts.base.detach() + parts.ups[0] @ parts.downs[0], layer.bias)

    return forward


def make_pass(model: Any, images: int) -> Callable[[], None]:
    """Return what runs forward and backward."""
    objective, batch = ImageObjective(model, MIDDLE, MIDDLE).train(), make_batch(images)

    def run() -> None:
        objective(**batch).backward()
        model.zero_grad()
        synchronize()

    return run


def make_step(model: Any, images: int) -> Callable[[], None]:
    """Return what runs a whole step of the trainer."""
    objective, batch = ImageObjective(model, MIDDLE, MIDDLE), make_batch(images)
    parts = [Trainable(name, parameter) for name, parameter in model.named_parameters()]
    settings = TrainingSection.model_validate({"global_batch": images, "micro_batch": images, "steps": 1, "lr": 1e-4})
    config = resolve_deepspeed_config(settings, torch.float32, world_size=1)
    engine = Engine(objective, parts, settings, config, choose_device())

    def run() -> None:
        engine.train_step([batch], 1e-4)
        synchronize()

    return run


def make_batch(images: int) -> dict[str, Tensor]:
    """Return images of noise, of two classes."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return {
        "pixels": pixels.to(choose_device()),
        "labels": torch.randint(0, 2, (images,), generator=generator).to(choose_device()),
    }


def synchronize() -> None:
    """Wait for the GPU."""
    if choose_device().type == "cuda":
        torch.cuda.synchronize()


def time_all(arguments: Any) -> tuple[Times, Times]:
    """Return seconds of forward and backward, and of whole steps, by form."""
    found = []
    for make in (make_pass, make_step):
        ready = {name: make(make_model(name, arguments.width), arguments.images) for name in FORMS}
        found.append(interleaved(ready, arguments.rounds))
    return found[0], found[1]


def measure(name: str, arguments: Any) -> Measured:
    """Return sizes and peak memory of two steps, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name]
    command += ["--images", str(arguments.images), "--width", str(arguments.width)]
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | MAPPED).stdout
    return Measured(*json.loads(out.strip().splitlines()[-1]))


def table(passes: Times, steps: Times, measured: dict[str, Measured]) -> tuple[list[str], bool]:
    """Return the lines of a Markdown table and of the bounds, and whether all are kept."""
    dense = measured["dense"]
    lines = [
        "| form | forward + backward s | x dense | step s | x dense | peak GB | parameters M | x dense | "
        "linears x dense |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, made in measured.items():
        cells = [
            f"{statistics.median(passes[name]):.2f} | {ratio(passes, name, 'dense'):.3f}",
            f"{statistics.median(steps[name]):.2f} | {ratio(steps, name, 'dense'):.3f}",
            f"{made.gb:.2f} | {made.parameters / 1e6:.2f} | {made.parameters / dense.parameters:.3f}",
            f"{made.linears / dense.linears:.3f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    chain, ours, theirs = measured["chain"], measured["star, base from the first layer"], measured["released"]
    saved = ADAM_BYTES * (dense.parameters - chain.parameters) / 1e9
    star = "star, base from the first layer"
    bounds = [
        ("chain: forward + backward / dense", ratio(passes, "chain", "dense"), FORWARD_BACKWARD),
        ("chain: step / dense", ratio(steps, "chain", "dense"), STEP),
        ("chain: peak GB, at most dense less its saved Adam moments", chain.gb, dense.gb - saved),
        ("chain: parameters (gradients, checkpoints) / dense", chain.parameters / dense.parameters, PARAMETERS),
        ("star: forward + backward / released", ratio(passes, star, "released"), 1.0),
        ("star: peak GB, at most the released's", ours.gb, theirs.gb),
    ]
    for text, got, most in bounds:
        lines.append(f"\n{'kept' if got <= most else 'NOT KEPT'}: {text}: {got:.3f} (bound {most:.3f})")
    return lines, all(got <= most for _, got, most in bounds)


if __name__ == "__main__":
    raise SystemExit(main())
