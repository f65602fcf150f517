"""Trains a model of about 1 GB for two steps, dense and in nf4, and says how much memory each process needed for it.

deepspeed --num_gpus 4 tests/training/loading_worker.py MODEL DEEPSPEED DATA.jsonl OUT
"""

import gc
import json
import sys
from contextlib import closing
from pathlib import Path

import torch

from glora_llm import recipe as recipes
from glora_llm.launch import ranks
from glora_llm.launch.quiet import quiet_libraries
from glora_llm.launch.stop import StopRequest
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.run.build import build
from glora_llm.run.train import Run
from glora_llm.training.loop import peak_memory_gb, reset_peak_memory
from glora_llm.training.metric_log import MetricLog

CPU = torch.device("cpu")
TINY = "embedded:tiny-llama"
COMMON = [
    "training.steps=2", "training.warmup=0", "training.global_batch=4", "training.micro_batch=1", "data.prompt=null",
    "data.format=prompt_completion", "data.test=null", "data.max_rows=null", "data.max_test_rows=null",
    "data.validation=4", "evaluation.batch=1", "output.save_every=2",
]  # fmt: skip


def train(
    model: str, quantization: str, settings: list[str], folder: Path, processes: ranks.Processes
) -> tuple[float, float]:
    """Train into `folder`; return the peaks of loading and of training, in GB, with all that the process holds."""
    wanted = [f"model.name_or_path={model}", f"model.quantization={quantization}", f"output.dir={folder}"]
    recipe = recipes.load("tiny_cpu", [*COMMON, *settings, *wanted])
    reset_peak_memory(CPU)
    plan, made = make_plan(recipe, world_size=processes.world_size), RunFolder(folder)
    parts = build(plan, made, processes)
    with closing(MetricLog(folder, 0, plan.steps, processes.is_main_process, plan.task.unit)) as log:
        Run(plan, made, processes, parts, log, StopRequest()).train()
    parts.engine.close()
    peaks = parts.load_peak_gb, peak_memory_gb(CPU)
    del parts
    gc.collect()  # the next model must not be measured beside this one
    return peaks


def main() -> None:
    """Train a tiny model first, which imports every library; count from there."""
    quiet_libraries()
    model, deepspeed, data, out = *sys.argv[-4:-1], Path(sys.argv[-1])
    settings = [f"training.deepspeed={deepspeed}", f"data.source={data}"]
    processes = ranks.start()
    train(TINY, "nf4", settings, out / "tiny", processes)
    reset_peak_memory(CPU)
    before = peak_memory_gb(CPU)
    peaks = {name: train(model, name, settings, out / name, processes) for name in ("nf4", "none")}
    mine = {name: [peak - before for peak in pair] for name, pair in peaks.items()}
    everyone: list[object] = [None] * processes.world_size
    torch.distributed.all_gather_object(everyone, mine)
    if processes.is_main_process:
        (out / "peaks.json").write_text(json.dumps(everyone, indent=1))
    ranks.stop()


if __name__ == "__main__":
    main()
