"""`glora-llm train` and `train.py`: train one recipe."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glora_llm import recipe
from glora_llm.launch.environment import planned_world_size
from glora_llm.plan.early import check_early
from glora_llm.schema import Recipe

if TYPE_CHECKING:
    from glora_llm.launch.stop import StopRequest

TRAIN = """\
Train one recipe: a YAML file, with any of its keys changed on the command line.

examples:
  glora-llm train --recipe quickstart                         this process: one GPU, or the CPU
  glora-llm train --gpus all --recipe llama2_glora            every GPU of this machine
  glora-llm train --gpus 2 --recipe my/own.yaml output.dir=runs/mine training.lr=1e-4
  glora-llm train --hostfile hosts --recipe llama2_70b_glora  several machines
  deepspeed train.py --recipe llama2_glora                    the same by DeepSpeed's own command
  glora-llm train --recipe llama2_glora --dry-run             check everything, train nothing

The same command again goes on from the newest complete checkpoint of output.dir. Ctrl-C, SIGTERM,
SIGUSR1 or a closed terminal: a checkpoint is written, then exit code 75; a second one ends at once.
A value is written as in YAML: training.lr=1e-4, merge.after_training=true,
'adapter.targets=[q_proj, v_proj]'. docs/recipe_reference.md lists every key."""


def add_command(commands: Any, style: Any) -> None:
    """Add `train` to the parser of `glora-llm`."""
    command = commands.add_parser("train", help="train a recipe", description=TRAIN, formatter_class=style)
    add_train_arguments(command)
    where = command.add_mutually_exclusive_group()
    where.add_argument("--gpus", metavar="N", help="processes to start here, one a GPU (or on the CPU), or all")
    where.add_argument("--hostfile", metavar="FILE", type=Path, help="start them on machines: lines of `NAME slots=N`")
    command.set_defaults(command=train)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `train.py` and `glora-llm train` both take."""
    parser.add_argument("--recipe", metavar="NAME", required=True, help="a recipe's name, or the path of a YAML file")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="changes to the recipe")
    parser.add_argument("--dry-run", action="store_true", help="check recipe, data, targets and batch; train nothing")
    # DeepSpeed's launcher adds it; the process's number itself is read from the environment.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)


def train(arguments: argparse.Namespace) -> int:
    """Run `glora-llm train`."""
    checked = recipe.load(arguments.recipe, arguments.overrides)  # before the slow imports: a typo answers at once
    if getattr(arguments, "gpus", None) is not None or getattr(arguments, "hostfile", None) is not None:
        return _launch(arguments, checked)
    return train_checked(checked, arguments.dry_run)


def _launch(arguments: argparse.Namespace, checked: Recipe) -> int:
    """Start the processes that --gpus or --hostfile asks for; a single one is this one."""
    from glora_llm.launch import start

    start.require_no_launcher()
    hosts = start.read_hostfile(arguments.hostfile) if arguments.hostfile else {start.HERE: 0}
    here, processes = start.is_here(hosts), sum(hosts.values())
    if here:
        processes = start.local_processes(str(processes) if arguments.hostfile else arguments.gpus)
    if arguments.dry_run:
        os.environ["WORLD_SIZE"] = str(processes)  # the batch is checked for so many
    if arguments.dry_run or (here and processes == 1):
        return train_checked(checked, arguments.dry_run)
    check_early(checked, processes)
    command = ["train", "--recipe", arguments.recipe, *arguments.overrides]
    return start.run_here(processes, command) if here else start.run_on(hosts, arguments.hostfile, command)


def train_checked(checked: Recipe, dry_run: bool = False) -> int:
    """Train in this process, one of the launch's, or check the recipe."""
    check_early(checked, planned_world_size())
    if dry_run:
        _run(checked, None)
        return 0
    from glora_llm.launch.stop import StopRequest

    stop = StopRequest(checked.output.max_hours)
    with stop.listening():
        _run(checked, stop)
    return 0


def _run(checked: Recipe, stop: "StopRequest | None") -> None:
    from glora_llm.launch.quiet import quiet_libraries

    quiet_libraries()
    from glora_llm.run import train as run

    run.train(checked, dry_run=stop is None, stop=stop)
