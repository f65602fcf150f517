"""One process of the launch that loads some layers of a large shape under ZeRO 3.

deepspeed --module scripts.gpu_checks.sharded_shape_worker SHAPE OUT
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed as dist

from glora_llm import recipe as recipes
from glora_llm.launch import ranks
from glora_llm.launch.quiet import quiet_libraries
from glora_llm.models.random_llama import LLAMA2_70B, TINY, write_random_llama
from glora_llm.plan.memory import model_sizes
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.run.build import build

LAYERS = {"70B": 4, "rehearsal": 4}
SHAPES = {
    "70B": replace(LLAMA2_70B, layers=LAYERS["70B"]),
    "rehearsal": replace(TINY, layers=LAYERS["rehearsal"], hidden=512, intermediate=1408, heads=8, kv_heads=4),
}


def main() -> None:
    """Write the model once, load it on all processes, and time a step."""
    quiet_libraries()
    name, out = sys.argv[-2], Path(sys.argv[-1])
    processes = ranks.start()
    folder = out / "model"
    if processes.is_main_process:
        folder.mkdir()
        write_random_llama(folder, SHAPES[name], seed=0)
    dist.barrier()
    tokens = 1024 if name == "70B" else 192
    overrides = [
        f"model.name_or_path={folder}", "model.quantization=nf4", "model.gradient_checkpointing=true",
        "model.dtype=auto", "training.deepspeed=zero3", f"training.global_batch={processes.world_size}",
        "training.micro_batch=1", "data.packing=true", f"data.max_tokens={tokens}", "data.max_rows=512",
        f"output.dir={out / 'run'}",
    ]  # fmt: skip
    recipe = recipes.load("tiny_cpu", overrides)
    plan = make_plan(recipe, world_size=processes.world_size)
    on_gpu = processes.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(processes.device)
    engine = build(plan, RunFolder(out / "run"), processes).engine
    loading = torch.cuda.max_memory_allocated(processes.device) if on_gpu else 0
    seconds = []
    for step in range(3):
        began = time.perf_counter()
        engine.train_step(plan.process_batches(step, processes.process_rank, processes.world_size), 1e-4)
        seconds.append(time.perf_counter() - began)
    held = torch.tensor([engine.held().bytes, loading], dtype=torch.float64, device=processes.device)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    if processes.is_main_process:
        dtype = torch.bfloat16 if on_gpu else torch.float32
        sizes = model_sizes(recipe, folder, dtype)
        whole = (sum(sizes.frozen) + sum(sizes.trained)) * dtype.itemsize + sizes.state_bytes
        layer = (SHAPES[name].hidden * SHAPES[name].intermediate * 3 + 2 * SHAPES[name].hidden ** 2) * dtype.itemsize
        facts = {"held": float(held[0]), "loading": float(held[1]), "whole": whole, "layer": layer}
        (out / "facts.json").write_text(json.dumps(facts | {"seconds": min(seconds[1:])}), encoding="utf-8")
    engine.close()
    ranks.stop()


if __name__ == "__main__":
    main()
