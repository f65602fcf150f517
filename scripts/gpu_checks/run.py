"""The checks in order."""

import datetime
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from glora_llm.errors import CheckFailed, UserError
from glora_llm.launch.quiet import quiet_libraries
from scripts.gpu_checks.context import Context
from scripts.gpu_checks.report import Report, Row

Check = Callable[[Context], Iterator[Row]]


def all_checks() -> dict[int, tuple[str, Check]]:
    """Return number -> (name, check)."""
    from scripts.gpu_checks import attention, kernels, machine, merging, preemption, sharded_shape, speed, stages

    return {
        1: ("machine", machine.check),
        2: ("kernels", kernels.check),
        3: ("attention", attention.check),
        4: ("stages, storage and optimizers", stages.check),
        5: ("several processes", stages.check_processes),
        6: ("preemption and failure", preemption.check),
        7: ("speed of a 7B shape", speed.check),
        8: ("merge and evaluation", merging.check),
        9: ("70B shape under ZeRO 3", sharded_shape.check),
    }


def run(device: str, out: Path, only: list[int] | None = None) -> int:
    """Run the checks, or some of them; print and write the table, which is the tenth.

    Returns:
        0, or 1 after the first check that failed.
    """
    quiet_libraries()
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu_check needs a GPU that torch can use, and there is none here; --device cpu rehearses it.")
        return 2
    shutil.rmtree(out, ignore_errors=True)
    count = torch.cuda.device_count() if device == "cuda" else 2
    context = Context(torch.device(device, 0) if device == "cuda" else torch.device("cpu"), count, out.resolve())
    checks = {number: check for number, check in all_checks().items() if not only or number in only}
    report = Report(out, about(context))
    try:
        with report:
            for number, (name, check) in checks.items():
                report.begin(f"{number} {name}")
                for row in check(context):
                    report.add(row)
    except (CheckFailed, UserError) as error:
        print(
            f"\nfailed in check {report.check}: {error}\n{out}/gpu_check.json has what was measured.", file=sys.stderr
        )
        return 1
    print(f"\n{report.table()}\npassed; {out}/gpu_check.json and gpu_check.md")
    return 0


def about(context: Context) -> dict[str, str]:
    """Return the head of the report."""
    name = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else "CPU (a rehearsal)"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": f"python scripts/gpu_check.py --device {context.device.type}",
        "device": f"{context.processes} x {name}",
        "torch": torch.__version__,
    }
