"""`glora-llm plan`: what a recipe will take, before it runs."""

import argparse
from pathlib import Path
from typing import Any

from glora_llm import recipe
from glora_llm.errors import UserError, number_above_zero
from glora_llm.launch.environment import planned_world_size
from glora_llm.plan.early import check_early

PLAN = """\
Say what a recipe will take, without its weights: trained parameters, memory in each phase by part,
files, and the least time; whether it fits, and else which settings would. Nothing is written.

examples:
  glora-llm plan --recipe quickstart                                   on this machine
  glora-llm plan --recipe llama2_glora --gpus 1 --gpu-memory 24        one GPU of 24 GB
  glora-llm plan --recipe llama2_70b_glora --gpus 4 --gpu "A100" --gpu-memory 80
  glora-llm plan --recipe my.yaml training.micro_batch=8 --json        for programs, in bytes

Activations are those of the project's own step on tensors without values. Where the data are on
this machine, batches are as long as theirs, else every row is full. A model on the hub is asked for
its configuration alone. docs/plan.md: how near it comes to what was measured."""


def add_command(commands: Any, style: Any) -> None:
    """Add `plan` to the parser of `glora-llm`."""
    command = commands.add_parser(
        "plan", help="memory, files, time of a recipe", description=PLAN, formatter_class=style
    )
    command.add_argument("--recipe", metavar="NAME", required=True, help="a recipe's name, or the path of a YAML file")
    command.add_argument("overrides", metavar="section.key=value", nargs="*", help="changes to the recipe")
    command.add_argument("--gpus", metavar="N", help="GPUs, one process each (default: this machine, one process)")
    command.add_argument("--gpu-memory", metavar="GB", help="of each GPU, in GB of 10^9 bytes (default: not known)")
    command.add_argument("--gpu", metavar="NAME", help="such as H100 or 'RTX 4090': for the least time")
    command.add_argument("--json", action="store_true", help="print JSON; numbers are bytes, elements and seconds")
    command.set_defaults(command=plan)


def plan(arguments: argparse.Namespace) -> int:
    """Run `glora-llm plan`."""
    checked = recipe.load(arguments.recipe, arguments.overrides)
    gpus = _gpus(arguments.gpus)
    memory = number_above_zero(arguments.gpu_memory, "--gpu-memory", "GB of one GPU above 0, such as 24")
    from glora_llm.plan.subjects import not_here, subject_here

    left_out = not_here(checked)
    check_early(checked, gpus or planned_world_size(), data=not left_out, weights=not left_out)
    from glora_llm.launch.quiet import quiet_libraries

    quiet_libraries()
    from glora_llm.plan.forecast import Machine, forecast

    machine = Machine.of(gpus, memory, arguments.gpu)
    folder, resolved = subject_here(checked, machine.count, left_out)
    found = forecast(checked, folder, machine, resolved)
    if arguments.json:
        import json

        print(json.dumps({"recipe": arguments.recipe} | found.as_dict(), indent=1))
        return 0
    from glora_llm.report.plan_table import print_forecast

    print_forecast(found, Path(arguments.recipe).stem, left_out)
    return 0


def _gpus(text: str | None) -> int | None:
    """Return the number that --gpus gives."""
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= 100_000):
        raise UserError(f"--gpus is '{text}'; expected a number of GPUs above 0, such as 8.")
    return int(text)
