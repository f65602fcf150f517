"""One process of the launch that trains all scenarios, because importing the libraries takes longer than they do.

deepspeed --module scripts.gpu_checks.stages_worker MODEL OUT
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from torch import distributed as dist

from glora_llm.launch import ranks
from glora_llm.launch.quiet import quiet_libraries
from glora_llm.launch.ranks import Processes
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.run.build import build
from glora_llm.training.deepspeed_config import read_deepspeed_config
from scripts.gpu_checks.scenarios import CHECKPOINT, SCENARIOS, recipe_of, train


def main() -> None:
    """Train every scenario that this device has, and those that are resumed a second time from their checkpoint."""
    quiet_libraries()
    model, out = sys.argv[-2], Path(sys.argv[-1])
    processes = ranks.start()
    for scenario in SCENARIOS:
        if scenario.needs_gpu and processes.device.type != "cuda":
            continue
        if processes.is_main_process:
            print(f"scenario {scenario.name}", flush=True)
        train(scenario, model, out / scenario.name, processes)
        if scenario.is_resumed:
            again = out / f"{scenario.name}-resumed"
            if processes.is_main_process:
                step = f"checkpoints/step-{CHECKPOINT}"
                shutil.copytree(out / scenario.name / step, again / step)
            dist.barrier()
            train(scenario, model, again, processes)
    gathered = left_gathered(model, out / "gathered", processes)
    if processes.is_main_process:
        (out / "gathered.json").write_text(json.dumps(gathered), encoding="utf-8")
    ranks.stop()


def left_gathered(model: str, folder: Path, processes: Processes) -> dict[str, int]:
    """Train and score under ZeRO 3, and count the parameters that are still whole although they need not be."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    zero3 = next(scenario for scenario in SCENARIOS if scenario.name == "zero3-nf4")
    recipe = recipe_of(zero3, model, processes.world_size, folder)
    config = folder.with_name("zero3.json")
    if processes.is_main_process:
        config.write_text(json.dumps(_dividing_all()), encoding="utf-8")
    dist.barrier()
    training = recipe.training.model_copy(update={"deepspeed": str(config)})
    plan = make_plan(recipe.model_copy(update={"training": training}), world_size=processes.world_size)
    engine: Any = build(plan, RunFolder(folder), processes).engine
    batches = plan.process_batches(0, processes.process_rank, processes.world_size)
    engine.train_step(batches, 1e-3)
    engine.score(batches[0])
    divided = [p for p in engine.ds.module.parameters() if not p.ds_persist]
    whole = sum(p.ds_status == ZeroParamStatus.AVAILABLE for p in divided)
    engine.close()
    return {"divided": len(divided), "whole": whole}


def _dividing_all() -> dict[str, Any]:
    """Return the shipped configuration of ZeRO 3, under which small parameters are divided too and kept no longer."""
    config = read_deepspeed_config("zero3")
    names = ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters", "prefetch_bucket_size")
    return config | {"zero_optimization": config["zero_optimization"] | {f"stage3_{name}": 0 for name in names}}


if __name__ == "__main__":
    main()
