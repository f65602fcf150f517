"""Runs that are trained, or resumed, by one launch of any number of processes.

deepspeed --num_gpus N tests/training/elastic_worker.py JOBS.json

JOBS.json: [{"recipe": NAME, "run": FOLDER, "overrides": [...]}, ...], one after the other. Each run folder gets
`samples-P.json` from every process P: step -> the rows of its micro batches; and, where a checkpoint was restored,
`restored.json`: the largest difference between what the checkpoint holds and what the engine gathers again.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from glora_llm import recipe
from glora_llm.data.sampler import GlobalSampler
from glora_llm.launch import ranks
from glora_llm.launch.quiet import quiet_libraries
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.run import train as run
from glora_llm.training.engine import Engine

process_rows, restore = GlobalSampler.process_rows, Engine.restore
samples: dict[int, Any] = {}
restored: list[float] = []


def noted_rows(self: GlobalSampler, step: int, *place: int) -> list[list[int]]:
    """Note the rows of a step."""
    samples[step] = process_rows(self, step, *place)
    found: list[list[int]] = samples[step]
    return found


def noted_restore(self: Engine, tensors: dict[str, Tensor], *rest: Any) -> None:
    """Restore, gather again, and note the largest difference; other names are a difference too."""
    restore(self, tensors, *rest)
    gathered = dict(self.state())
    if gathered:
        assert gathered.keys() == tensors.keys()
        restored.append(max(float((gathered[name] - tensors[name]).abs().max()) for name in tensors))


@contextlib.contextmanager
def noting() -> Iterator[None]:
    """Note what the runs do."""
    GlobalSampler.process_rows, Engine.restore = noted_rows, noted_restore  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        GlobalSampler.process_rows, Engine.restore = process_rows, restore  # type: ignore[method-assign]


def go(job: dict[str, Any], processes: ranks.Processes) -> None:
    """Train one run, or go on with it."""
    samples.clear()
    restored.clear()
    overrides = [*job["overrides"], f"output.dir={job['run']}"]
    plan = make_plan(recipe.load(job["recipe"], overrides), world_size=processes.world_size)
    folder = RunFolder(Path(job["run"]))
    run.train_plan(plan, folder, processes)
    (folder.path / f"samples-{processes.process_rank}.json").write_text(json.dumps(samples))
    if restored:
        (folder.path / "restored.json").write_text(json.dumps(restored))


def do(jobs: list[dict[str, Any]]) -> None:
    """Do all jobs on the processes of this launch."""
    processes = ranks.start()
    with noting():
        for job in jobs:
            go(job, processes)
    ranks.stop()


if __name__ == "__main__":
    quiet_libraries()
    do(json.loads(Path(sys.argv[-1]).read_text()))
