"""`glora-llm verify-resume`: prove that a killed run ends where an uninterrupted one ends."""

import argparse
from pathlib import Path
from typing import Any

from glora_llm import recipe
from glora_llm.atomic import require_new
from glora_llm.errors import UserError
from glora_llm.plan.early import check_early

VERIFY = """\
Train a recipe twice, once left alone and once killed (SIGKILL to all its processes) and started
again, and compare what both end with. On one number of processes the trained weights must be the
same bytes, and losses, learning rates and gradient norms the same numbers; with --then, where every
second start is on another number, weights and losses must be within --tolerance.

examples:
  glora-llm verify-resume --recipe tiny_cpu --kill-after 12 --out proof
  glora-llm verify-resume --recipe quickstart --gpus 2 --kills 3 --out proof --deterministic
  glora-llm verify-resume --recipe tiny_cpu --gpus 2 --then 1 --kill-after 7 13 --out proof

It writes DIR/proof.json: hashes, losses, differences, starts, versions and hardware, to go into a
model card. Exit code 1: they differ. Give a recipe of few steps (training.steps=20), or it trains
all of it twice."""


def add_command(commands: Any, style: Any) -> None:
    """Add `verify-resume` to the parser of `glora-llm`."""
    command = commands.add_parser(
        "verify-resume", help="prove that a killed run ends alike", description=VERIFY, formatter_class=style
    )
    command.add_argument("--recipe", metavar="NAME", required=True, help="a recipe's name, or the path of a YAML file")
    command.add_argument("overrides", metavar="section.key=value", nargs="*", help="changes to the recipe")
    command.add_argument("--gpus", metavar="N", default="1", help="processes (default: 1), one a GPU or on the CPU")
    command.add_argument("--then", metavar="M", help="processes of every second start (default: as --gpus)")
    where = command.add_mutually_exclusive_group(required=True)
    where.add_argument("--kill-after", metavar="STEP", nargs="+", type=int, help="kill after these steps")
    where.add_argument("--kills", metavar="K", type=int, help="kill after K steps drawn by --seed")
    command.add_argument("--seed", metavar="S", type=int, default=0, help="of --kills (default: 0)")
    command.add_argument("--tolerance", metavar="X", type=float, default=1e-4, help="with --then (default: 1e-4)")
    command.add_argument("--deterministic", action="store_true", help="as training.deterministic=true")
    command.add_argument("--out", metavar="DIR", type=Path, required=True, help="a new folder for runs and proof.json")
    command.set_defaults(command=verify_resume)


def verify_resume(arguments: argparse.Namespace) -> int:
    """Run `glora-llm verify-resume`."""
    overrides = [*arguments.overrides, *(["training.deterministic=true"] if arguments.deterministic else [])]
    checked = recipe.load(arguments.recipe, overrides)
    from glora_llm.launch import start
    from glora_llm.launch.deterministic import check_deterministic
    from glora_llm.launch.device import choose_device

    start.require_no_launcher()
    processes = start.local_processes(arguments.gpus)
    then = _then(arguments.then) if arguments.then else processes
    for count in (processes, then):
        check_early(checked, count)
    steps = checked.training.steps
    if steps is None:
        raise UserError(
            "The steps of a run by epochs follow from its data; give training.steps=N training.epochs=null."
        )
    if not 0 <= arguments.tolerance < 1:
        raise UserError(f"--tolerance is {arguments.tolerance}; expected a relative difference from 0 to below 1.")
    if checked.training.deterministic:
        check_deterministic(checked, choose_device())
    require_new(arguments.out)
    from glora_llm.run.verify_resume import Trial, kill_points, verify

    kills = (
        kill_points(steps, arguments.kills, arguments.seed)
        if arguments.kills is not None
        else _chosen(arguments.kill_after, steps)
    )
    verify(Trial(arguments.recipe, tuple(overrides), processes, then, kills, arguments.tolerance, arguments.out))
    return 0


def _then(text: str) -> int:
    """Return the number that --then gives."""
    from glora_llm.launch import start

    try:
        return start.local_processes(text)
    except UserError as error:
        raise UserError(str(error).replace("--gpus", "--then")) from error


def _chosen(given: list[int], steps: int) -> tuple[int, ...]:
    """Return the steps of --kill-after, rising."""
    wrong = [step for step in given if not 1 <= step < steps]
    if wrong or len(set(given)) < len(given):
        raise UserError(
            f"--kill-after is {' '.join(map(str, given))}; expected different steps from 1 to {steps - 1}, before the "
            f"last of the run's {steps}."
        )
    return tuple(sorted(given))
