"""Trains supernets under every ZeRO stage, resumes some and searches one, in one launch of two ranks.

deepspeed --num_gpus 2 tests/training/supernet_worker.py OUT

OUT holds data.jsonl and zero3_partitioned.json, a DeepSpeed configuration that keeps no parameter whole.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from glora_llm import recipe
from glora_llm.glora.path import genome_to_slots
from glora_llm.glora.path_sampler import Supernet
from glora_llm.launch import ranks
from glora_llm.launch.quiet import quiet_libraries
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.run import train as run

PARTITIONED = "zero3_partitioned"
STAGES = ("zero0", "zero1", "zero2", "zero3", PARTITIONED)
MICRO_BATCH = {"one": 4, "several": 2}  # micro steps of an optimizer step -> micro batch of a rank
TRAINED = (*(f"{stage}-several" for stage in STAGES), "zero0-one", f"{PARTITIONED}-one")
RESUMED = ("zero1-several", "zero3-several", f"{PARTITIONED}-one")
SEARCHED = "zero1-several"  # what all searches search
SEARCHES = ("additive-zero1", "additive-zero3", "evolution-zero1", f"evolution-{PARTITIONED}")
BUDGETS = ("3k", "1.5k")
TAUGHT = ("zero0", PARTITIONED)  # stages that train with all options of a supernet
OPTIONS = "adapter.supernet={ranks: [4, 2], sandwich: 3, odds: {B: {lora: 3}}, distill: 0.5}"
drawn: list[tuple[int, int, Any]] = []  # step, number of the micro batch, path of every layer
whole = Supernet.draw


def settings(out: Path) -> list[str]:
    """Return the overrides of all trainings."""
    return [
        "adapter.targets=[k_proj, down_proj]",
        "training.steps=3",
        "training.warmup=0",
        "training.global_batch=8",
        f"data.source={out / 'data.jsonl'}",
        "data.max_rows=null",
        "data.validation=8",
        "data.test=null",
        "data.max_test_rows=null",
        "merge.after_training=false",
        "output.save_every=1",
        "output.keep=5",
    ]


def trained_as(out: Path, name: str) -> list[str]:
    """Return the overrides of the training STAGE-MICRO_STEPS."""
    stage, micro_steps = name.split("-")
    micro_batch = f"training.micro_batch={MICRO_BATCH[micro_steps]}"
    return [*settings(out), "search=null", deepspeed(out, stage), micro_batch]


def searched_as(out: Path, strategy: str, stage: str) -> list[str]:
    """Return the overrides of a search."""
    keys = [f"strategy={strategy}", f"budget=[{', '.join(BUDGETS)}]", "passes=3", "population=5", "generations=3"]
    more = [override for override in trained_as(out, SEARCHED) if override != "search=null"]
    return [*more, deepspeed(out, stage), *(f"search.{key}" for key in keys)]


def taught_as(out: Path, stage: str) -> list[str]:
    """Return the overrides of a training with all options."""
    more = ["search=null", "training.micro_batch=2", "adapter.scaling=even", OPTIONS]
    return [*settings(out), deepspeed(out, stage), *more]


def deepspeed(out: Path, stage: str) -> str:
    """Return the override that sets the stage."""
    return f"training.deepspeed={out / f'{stage}.json' if stage == PARTITIONED else stage}"


def noted(self: Supernet, step: int, number: int) -> None:
    """Draw, and note what every layer will compute."""
    whole(self, step, number)
    genome = {name: layer.path["default"] for name, layer in self.layers.items()}
    drawn.append((step, number, genome_to_slots(genome)))


def go(folder: Path, overrides: list[str], processes: ranks.Processes) -> None:
    """Do what a launch does in `folder`; leave there what each rank drew."""
    drawn.clear()
    plan = make_plan(
        recipe.load("tiny_cpu_search", [*overrides, f"output.dir={folder}"]), world_size=processes.world_size
    )
    run.train_plan(plan, RunFolder(folder), processes)
    (folder / f"draws-{processes.process_rank}.json").write_text(json.dumps(drawn))


def copied(processes: ranks.Processes, source: Path, target: Path) -> Path:
    """Return a copy of a folder, which the first rank makes."""
    if processes.is_main_process:
        shutil.copytree(source, target)
    return target


def main() -> None:
    """Train, resume, search."""
    quiet_libraries()
    Supernet.draw = noted  # type: ignore[method-assign]
    out, processes = Path(sys.argv[-1]), ranks.start()
    for name in TRAINED:
        go(out / name, trained_as(out, name), processes)
    for stage in TAUGHT:
        go(out / f"taught-{stage}", taught_as(out, stage), processes)
    for name in RESUMED:
        copied(processes, out / name / "checkpoints" / "step-1", out / f"{name}-resumed" / "checkpoints" / "step-1")
        go(out / f"{name}-resumed", trained_as(out, name), processes)
    for name in SEARCHES:
        folder = copied(processes, out / SEARCHED, out / f"search-{name}")
        go(folder, searched_as(out, *name.split("-")), processes)
    ranks.stop()


if __name__ == "__main__":
    main()
