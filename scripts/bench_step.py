"""Time and memory of a training step: GLoRA against PEFT's LoRA and PEFT's GLoRA, same model, same batch.

  python scripts/bench_step.py [--rounds 7] [--rows 4] [--tokens 256] [--quantization none nf4] [--out FILE.md]

Times are medians of one interleaved run (each round times every method once), so a noisy machine disturbs all alike;
the ratio is the median of the ratios within a round. Memory is the peak over two steps, in a process of its own:
resident set on a CPU, allocated on a GPU. Exits with 1 when a bound of BOUNDS is not kept.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glora_llm.adapters.inject import inject
from glora_llm.data.batch import collate
from glora_llm.data.store import Row
from glora_llm.launch.device import choose_device
from glora_llm.launch.quiet import quiet_libraries
from glora_llm.models.attention import packed_arguments
from glora_llm.models.load import load_base
from glora_llm.models.resolve import resolve
from glora_llm.report.timing import interleaved, ratio
from glora_llm.schema import AdapterSection, ModelSection, Slots
from glora_llm.training.batch import to_device
from glora_llm.training.loop import peak_memory_gb
from glora_llm.training.objectives import CausalLMObjective

ALL_SLOTS: Slots = {"A": "lora", "B": "lora", "C": "vector", "E": "vector"}
METHODS: dict[str, AdapterSection] = {
    "PEFT LoRA r 8": AdapterSection(method="lora", rank=8),
    "GLoRA product r 8": AdapterSection(rank=8, slots=ALL_SLOTS),
    "GLoRA hadamard r 8": AdapterSection(rank=8, slots=ALL_SLOTS, composition="hadamard"),
    "PEFT GLoRA r 8": AdapterSection(method="glora", rank=8),  # replaced by PEFT's own tuner, dense only
}
# quantization, method, reference, bound on time, bound on memory; 1 / 1.7: at least 1.7 times faster
BOUNDS = [
    ("none", "GLoRA product r 8", "PEFT LoRA r 8", 1.05, 1.03),
    ("nf4", "GLoRA product r 8", "PEFT LoRA r 8", 1.05, 1.03),
    ("none", "GLoRA product r 8", "PEFT GLoRA r 8", 1 / 1.7, None),
    ("none", "GLoRA hadamard r 8", "PEFT GLoRA r 8", 1 / 1.4, None),
]


def main() -> int:
    """Measure, print a table, and compare with the bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--quantization", nargs="+", default=["none", "nf4"])
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet_libraries()
    if arguments.memory_of:
        step = make_step(arguments.memory_of, arguments.quantization[0], arguments)
        for _ in range(2):
            step()
        print(json.dumps(peak_memory_gb(choose_device())))
        return 0
    lines: list[str] = []
    failed = False
    for quantization in arguments.quantization:
        methods = [name for name in METHODS if quantization == "none" or name != "PEFT GLoRA r 8"]
        steps = {name: make_step(name, quantization, arguments) for name in methods}
        times = interleaved(steps, arguments.rounds)
        memory = {name: memory_of(name, quantization, arguments) for name in methods}
        part = table(quantization, times, memory)
        failed |= not within(quantization, times, memory, part)
        print("\n".join(part), flush=True)
        lines += part
        if arguments.out:
            arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(failed)


def make_step(name: str, quantization: str, arguments: Any) -> Callable[[], None]:
    """Return a function that does one step (forward, backward, fused AdamW) of a freshly loaded model."""
    section = ModelSection(name_or_path=arguments.model, quantization=quantization)  # type: ignore[arg-type]
    base: Any = load_base(section, resolve(section).folder, choose_device())
    model = peft_glora(base) if name.startswith("PEFT GLoRA") else inject(base, METHODS[name], seed=0, steps=100)
    inner: Any = model.get_base_model()
    objective = CausalLMObjective(inner, partial(packed_arguments, inner.config._attn_implementation)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    tokens = np.random.default_rng(0).integers(0, 1000, (arguments.rows, arguments.tokens), dtype=np.int32)
    rows = [Row(row, np.ones(len(row), dtype=np.bool_), [0]) for row in tokens]
    batch = to_device(collate(rows, pad_id=0), choose_device())

    def step() -> None:
        loss: Any = objective(**batch)
        (loss / objective.targets(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def peft_glora(base: Any) -> Any:
    """Return the model under PEFT's own GLoRA tuner, rank 8, on the same linears."""
    from peft import GloraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(base, GloraConfig(r=8, target_modules=targets))


def memory_of(name: str, quantization: str, arguments: Any) -> float:
    """Return the peak memory of three steps in a process of its own, GB."""
    command = [sys.executable, __file__, "--memory-of", name, "--quantization", quantization]
    command += ["--rows", str(arguments.rows), "--tokens", str(arguments.tokens), "--model", arguments.model]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(out.strip().splitlines()[-1]))


def table(quantization: str, times: dict[str, list[float]], memory: dict[str, float]) -> list[str]:
    """Return the lines of a Markdown table."""
    reference = "PEFT LoRA r 8"
    lines = [
        f"\nbase {quantization}",
        "",
        "| method | step s (median) | x LoRA | peak GB | x LoRA |",
        "|---|---|---|---|---|",
    ]
    for name, values in times.items():
        share = ratio(times, name, reference)
        gb, of_lora = memory[name], memory[name] / memory[reference]
        lines.append(f"| {name} | {statistics.median(values):.2f} | {share:.3f} | {gb:.2f} | {of_lora:.3f} |")
    return lines


def within(quantization: str, times: dict[str, list[float]], memory: dict[str, float], lines: list[str]) -> bool:
    """Compare with the bounds; add a line for each."""
    good = True
    for wanted, method, reference, time_bound, memory_bound in BOUNDS:
        if wanted != quantization:
            continue
        got = ratio(times, method, reference)
        held = got <= time_bound
        text = f"{method} / {reference}: time {got:.3f} (bound {time_bound:.3f})"
        if memory_bound:
            share = memory[method] / memory[reference]
            held &= share <= memory_bound
            text += f", memory {share:.3f} (bound {memory_bound:.2f})"
        lines.append(f"\n{'kept' if held else 'NOT KEPT'}: {text}")
        good &= held
    return good


if __name__ == "__main__":
    raise SystemExit(main())
