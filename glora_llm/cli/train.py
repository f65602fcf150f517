"""`glora-llm train` and `train.py`: train one recipe."""

import argparse
from typing import Any

from glora_llm import recipe
from glora_llm.launch.environment import planned_world_size
from glora_llm.plan.early import check_early

TRAIN = """\
Train one recipe: a YAML file, with any of its keys changed on the command line.

examples:
  deepspeed train.py --recipe quickstart                             every GPU of this machine
  DS_ACCELERATOR=cpu deepspeed --num_gpus 2 train.py --recipe tiny_cpu    two processes on the CPU
  deepspeed train.py --recipe llama2_glora training.lr=1e-4 adapter.slots.A=none
  deepspeed train.py --recipe my/own.yaml output.dir=runs/mine
  glora-llm train --recipe llama2_glora --dry-run                    check everything, train nothing

The same command again goes on from the newest complete checkpoint of output.dir.
A value is written as in YAML: training.lr=1e-4, merge.after_training=true, 'adapter.targets=[q_proj, v_proj]'.
docs/recipe_reference.md lists every key."""


def add_command(commands: Any, style: Any) -> None:
    """Add `train` to the parser of `glora-llm`."""
    command = commands.add_parser("train", help="train a recipe", description=TRAIN, formatter_class=style)
    add_train_arguments(command)
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
    check_early(checked, planned_world_size())
    from glora_llm.launch.quiet import quiet_libraries

    quiet_libraries()
    from glora_llm.run import train as run

    run.train(checked, dry_run=arguments.dry_run)
    return 0
