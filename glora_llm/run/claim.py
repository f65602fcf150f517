"""Take a run folder: what a new run writes before its first step, once nothing can be refused any more."""

import json
from pathlib import Path
from typing import Any

import torch

from glora_llm import recipe as recipes
from glora_llm.merge.sample import keep_sample
from glora_llm.models import load
from glora_llm.plan.plan import Plan
from glora_llm.plan.run_folder import AUTO_RATE, RunFolder
from glora_llm.run.structure import Structure


def base_identity(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Return the identity of the base, the dtype that it is computed in, and the commits of data of the hub."""
    dtype = str(load.compute_dtype(plan.recipe.model, device)).removeprefix("torch.")
    base = plan.base
    identity = {"name": base.name, "revision": base.revision, "fingerprint": base.fingerprint, "dtype": dtype}
    if base.headless:
        identity["headless"] = base.headless
    return identity | {"data": plan.task.data.commits}


def claim(plan: Plan, folder: RunFolder, device: torch.device, structure: Structure | None = None) -> None:
    """Write the owner of the folder, recipe, base and sample, now that nothing can be refused any more."""
    if plan.rate is not None:  # before the recipe, which has the number: without this file it would be another run
        folder.write(AUTO_RATE, json.dumps({"lr": plan.rate.lr, "reason": plan.rate.reason}, indent=1) + "\n")
    folder.write("recipe.yaml", recipes.dump(plan.recipe))
    if structure is not None:
        structure.write(folder)
    folder.write("base.json", json.dumps(base_identity(plan, device), indent=1) + "\n")
    keep_sample(plan, folder)
    if plan.recipe.adapter.genome is not None:
        folder.write("genome.json", Path(plan.recipe.adapter.genome).read_text(encoding="utf-8"))
