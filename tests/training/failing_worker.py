"""A run whose rank 1 fails in the middle of step 5: `deepspeed --num_gpus 2 failing_worker.py RUN`."""

import sys
from typing import Any

from glora_llm import recipe
from glora_llm.plan import plan
from glora_llm.run.train import train
from tests.training.worker import COMMON

whole = plan.Plan.rank_batches


def broken(self: plan.Plan, step: int, rank: int, world: int) -> Any:
    """Return the batches, but for step 5 of rank 1."""
    if (step, rank) == (4, 1):
        raise OSError("the disk of rank 1 went away")
    return whole(self, step, rank, world)


if __name__ == "__main__":
    plan.Plan.rank_batches = broken  # type: ignore[method-assign]
    train(recipe.load("tiny_cpu", [*COMMON, f"output.dir={sys.argv[-1]}"]))
