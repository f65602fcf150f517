"""A run that something happens to, at a place that no clock decides.

deepspeed --num_gpus 2 tests/training/interrupted_worker.py HOW RECIPE [section.key=value ...]

HOW is `fails` (process 1, in the middle of step 5), `hangs` (both, before step 5), `is_preempted` (process 1 gets
SIGTERM in step 3, which is left out; the checkpoint is written when process 1 waits for it, or has left:
RUN/left-early) or `hangs_in_search=N` (when the journal has N scores).
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import distributed as dist

from glora_llm.cli import train_main
from glora_llm.plan.plan import Plan
from glora_llm.search.archive import Journal
from glora_llm.training import checkpoint

Batches = Callable[[Plan, int, int, int], Any]
batches: Batches = Plan.process_batches


def fails(plan: Plan, step: int, process_rank: int, world_size: int) -> Any:
    if (step, process_rank) == (4, 1):
        raise OSError("the disk of process 1 went away")
    return batches(plan, step, process_rank, world_size)


def hangs(plan: Plan, step: int, process_rank: int, world_size: int) -> Any:
    if step == 4:
        threading.Event().wait()
    return batches(plan, step, process_rank, world_size)


def is_preempted(plan: Plan, step: int, process_rank: int, world_size: int) -> Any:
    if (step, process_rank) == (2, 1):
        run, barrier = Path(plan.recipe.output.dir), dist.barrier

        def waits() -> None:
            (run / "waits").touch()
            barrier()

        def leaves() -> None:
            if not (run / "checkpoints" / "step-2").exists():
                (run / "left-early").touch()

        dist.barrier = waits  # type: ignore[assignment]
        atexit.register(leaves)
        os.kill(os.getpid(), signal.SIGTERM)
    return batches(plan, step, process_rank, world_size)


def write_slowly(write: Callable[..., Path], root: Path, *rest: Any) -> Path:
    """Write when process 1 waits for the checkpoint, or does not."""
    while not any((root.parent / name).exists() for name in ("waits", "left-early")):
        time.sleep(0.01)
    return write(root, *rest)


def main() -> int:
    how, recipe, *overrides = (text for text in sys.argv[1:] if not text.startswith("--local_rank"))
    name, _, number = how.partition("=")
    if name == "hangs_in_search":
        append = Journal._append

        def limited(journal: Journal, entry: dict[str, Any]) -> None:
            if journal.file is not None and len(journal.file.read_text().splitlines()) > int(number):
                threading.Event().wait()
            append(journal, entry)

        Journal._append = limited  # type: ignore[assignment, method-assign]
    else:
        Plan.process_batches = globals()[name]  # type: ignore[method-assign]
    if name == "is_preempted":
        write = checkpoint.write
        checkpoint.write = lambda root, *rest: write_slowly(write, root, *rest)
    return train_main(["--recipe", recipe, *overrides])


if __name__ == "__main__":
    raise SystemExit(main())
