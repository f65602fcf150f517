"""Compare what `glora-llm plan` computes with what runs need, on CPUs, as a Markdown table for docs/plan.md.

python scripts/plan_check.py [--only tiny_cpu quickstart] [--out FILE.md]

Each recipe runs a few steps in a process of its own; measured is the largest resident set of a phase above that of the
imports. With MALLOC_MMAP_THRESHOLD_=65536, which every measured process gets, it repeats to about a megabyte.
"""

import argparse
import datetime
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from glora_llm.errors import UserError

SHORT = (
    *("training.warmup=0", "training.steps=4", "training.epochs=null", "output.save_every=2"),
    *("merge.min_top1_agreement=0", "merge.max_loss_change=100"),  # so few steps leave answers that rounding changes
)
# What would take hours here and changes no batch's size.
FEWER: dict[str, tuple[str, ...]] = {
    "quickstart": ("data.validation=32", "data.max_test_rows=32", "evaluation.test_before=false"),
    "smollm2_glora": ("data.validation=32", "data.max_test_rows=32"),
    "smollm2_lora": ("data.validation=32", "data.max_test_rows=32"),
    "smollm2_alpaca": ("data.validation=16", "data.max_test_rows=16", "evaluation.test_before=false"),
    "smollm2_chat": ("data.validation=16", "data.max_test_rows=16", "evaluation.test_before=false"),
    "smollm2_glora_search": (
        *("data.validation=16", "data.max_test_rows=16", "search.passes=4", "search.finetune_steps=0"),
        "merge.after_training=false",
    ),
    "smollm2_lossless4": ("data.validation=32", "data.max_test_rows=32"),
    **dict.fromkeys(("smollm2_gsm8k", "smollm2_lora_gsm8k"), ("data.max_test_rows=4", "evaluation.test_before=false")),
    "tiny_cpu_search": ("search.passes=4",),
}


def main() -> int:
    """Measure, print the table; exit with 1 when a peak is further off than 10 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", metavar="RECIPE", help="these recipes (default: all that run here)")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--child", nargs=2, metavar=("RECIPE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child)))
        return 0
    from glora_llm import recipe as recipes
    from glora_llm.plan.subjects import not_here

    absent = {name: not_here(recipes.load(name)) for name in arguments.only or recipes.named_recipes()}
    names = [name for name, reason in absent.items() if not reason]
    found = {}
    for name in names:
        found[name] = in_a_process(name)
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    text = table(found, {name: reason for name, reason in absent.items() if reason})
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    return int(any(abs(off(values)) > 0.1 for values in found.values()))


def in_a_process(name: str) -> dict[str, Any]:
    """Return what `measure` returns, from a process that has imported nothing else."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", name, folder]
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{name} ended with exit code {result.returncode}")
    values: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return values


def measure(name: str, folder: str) -> dict[str, Any]:
    """Run a recipe in this process; return the bytes of each phase, computed and measured."""
    from glora_llm.launch.quiet import quiet_libraries

    quiet_libraries()
    import bitsandbytes  # noqa: F401
    import deepspeed  # noqa: F401
    import kornia  # noqa: F401
    import peft  # noqa: F401
    import torch
    import torch.utils.tensorboard
    import transformers.models.auto.processing_auto  # noqa: F401

    from glora_llm import recipe as recipes
    from glora_llm.merge.command import merge_run
    from glora_llm.plan.forecast import Machine, forecast
    from glora_llm.plan.plan import make_plan
    from glora_llm.run.train import train
    from glora_llm.training.loop import peak_memory_gb, reset_peak_memory

    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    imports = peak_memory_gb(cpu)
    run = Path(folder) / "run"
    recipe = recipes.load(name, [*SHORT, *FEWER.get(name, ()), f"output.dir={run}", "merge.after_training=false"])
    train(recipe)
    measured = {"searching": peak_memory_gb(cpu)} if recipe.search else {}
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    measured |= {"loading": summary["load_peak_gb"], "training": summary["peak_memory_gb"]}
    gc.collect()  # as a run does before it merges
    reset_peak_memory(cpu)
    if not recipe.adapter.is_supernet or recipe.search:
        try:
            merge_run(run, run / "merged")
        except UserError as error:
            print(f"not merged: {error}", file=sys.stderr)
        else:
            measured["merging"] = peak_memory_gb(cpu)
    plan = make_plan(recipe, world_size=1)
    phases = {phase.name: phase.total for phase in forecast(recipe, plan.base.folder, Machine.here(1), plan).phases}
    together = max(phases[key] for key in ("training", "evaluating", "saving") if key in phases)
    computed = {"loading": phases["loading"], "training": together}
    for key in measured.keys() - computed.keys():
        computed[key] = max(phases[key], together if key == "searching" else 0)
    return {key: (round(computed[key] / 1e6), round((gb - imports) * 1e3)) for key, gb in sorted(measured.items())}


def off(values: dict[str, Any]) -> float:
    """Return by which share the computed peak of a whole run is above the measured one."""
    computed, measured = (max(pair[side] for pair in values.values()) for side in (0, 1))
    return float(computed / measured - 1)


def table(found: dict[str, dict[str, Any]], absent: dict[str, str]) -> str:
    """Return the table under its date and command, and why recipes are not in it."""
    heads = ("loading", "training", "searching", "merging")
    lines = [
        f"{datetime.datetime.now(datetime.UTC).date().isoformat()}, `python scripts/plan_check.py`, MB above the "
        "imports, computed / measured (training with evaluation and saving):",
        "",
        f"| recipe | {' | '.join(heads)} | peak off by |",
        "|---|" + "---|" * (len(heads) + 1),
    ]
    for name, values in found.items():
        cells = " | ".join(_cell(values.get(head)) for head in heads)
        lines.append(f"| `{name}` | {cells} | {off(values):+.1%} |")
    left_out = [f"Not run here: `{name}` ({reason})." for name, reason in absent.items()]
    return "\n".join([*lines, "", *left_out, ""])


def _cell(pair: Any) -> str:
    return "" if pair is None else f"{pair[0]:,} / {pair[1]:,}"


if __name__ == "__main__":
    raise SystemExit(main())
