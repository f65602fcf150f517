"""Time of VLoRA's linears, forward and backward, against the same number of dense ones.

  python scripts/bench_vlora_linear.py [--rounds 7] [--rows 4096] [--layers 12] [--rank 8] [--compound 4]

Linears of one shape (ViT-B's) on the CPU. Every round times each form once, in turn, so a noisy machine disturbs all
alike; times are CPU seconds, which a busy machine disturbs least; the ratio to dense is the median of the ratios
within a round. `--rows 128 512 4096` shows where `auto` should change its form.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from glora_llm.report.timing import interleaved, ratio
from glora_llm.vlora import VLoRAConfig, make_compounds

SHAPES = {"768 x 768": (768, 768), "3072 x 768": (768, 3072)}  # O x I; ViT-B's attention and MLP
FORMS = {
    "chain composed": VLoRAConfig(form="composed"),
    "chain thin": VLoRAConfig(form="thin"),
    "chain auto": VLoRAConfig(),
    "star first composed": VLoRAConfig(topology="star", base_gradient="first", form="composed"),
    "star first thin": VLoRAConfig(topology="star", base_gradient="first", form="thin"),
    "star first auto": VLoRAConfig(topology="star", base_gradient="first"),
}


def main() -> None:
    """Measure and print one table a shape and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="+", default=[4096])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--compound", type=int, default=4)
    arguments = parser.parse_args()
    for shape, rows in ((shape, rows) for shape in SHAPES for rows in arguments.rows):
        steps = {"dense": step(stack(SHAPES[shape], arguments.layers), rows)}
        for name, config in FORMS.items():
            model = stack(SHAPES[shape], arguments.layers)
            keys = {**vars(config), "rank": arguments.rank, "layers_per_compound": arguments.compound}
            make_compounds(model, list(model), VLoRAConfig(**keys), torch.Generator().manual_seed(0))
            steps[name] = step(model, rows)
        print(f"\n{shape}, {rows} rows, {arguments.layers} linears, r {arguments.rank}, k {arguments.compound}\n")
        print("| form | CPU s (median) | x dense |\n|---|---|---|")
        times = interleaved(steps, arguments.rounds, time.process_time)
        for name, values in times.items():
            print(f"| {name} | {statistics.median(values):.4f} | {ratio(times, name, 'dense'):.3f} |", flush=True)


def stack(shape: tuple[int, int], layers: int) -> Any:
    """Return linears that are each fed the same input, so that the shape need not be square."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(*shape)) for _ in range(layers)))


def step(model: Any, rows: int) -> Callable[[], None]:
    """Return what runs every linear forward, then all of them backward, with the input's gradient."""
    inputs = [torch.randn(rows, model[0][0].in_features, requires_grad=True) for _ in model]
    upstream = torch.randn(rows, model[0][0].out_features)

    def run() -> None:
        outputs: list[Tensor] = [layer(x) for layer, x in zip(model, inputs, strict=True)]
        torch.autograd.backward(outputs, [upstream] * len(outputs))
        model.zero_grad()
        for x in inputs:
            x.grad = None

    return run


if __name__ == "__main__":
    main()
