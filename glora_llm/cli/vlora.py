"""`glora-llm vlora`: make VLoRA models."""

import argparse
from pathlib import Path
from typing import Any

from glora_llm.cli.vlora_from_dense import train_smaller
from glora_llm.cli.vlora_show import add_show
from glora_llm.cli.vlora_twin import add_twin
from glora_llm.errors import UserError, whole_number
from glora_llm.schema.vlora import VLORA_CHOICES

BASES = ("first", "mean")
VLORA = """\
Make a VLoRA model of a dense one: layers share bases, and the differences become low-rank
increments by truncated SVD. With --rank every k layers share, and the table says what a rank
loses. With --budget the layers that share, and the ranks, follow from what each would lose; the
model is then trained on text, with --distill against the dense model, as an ordinary run.

examples:
  glora-llm vlora from-dense my/model --rank 64 --layers-per-compound 5 --out my-vlora
  glora-llm vlora from-dense my/model --rank 32,64,128 --out folder  writes rank 32, measures all
  glora-llm vlora from-dense my/model --budget 0.5 --data text.txt --steps 2000 --distill --out run
  glora-llm vlora from-dense embedded:smollm2-135m-instruct --budget 0.5 --steps 20 --distill \\
      --data embedded:tinyshakespeare --out run training.lr=3e-4   any key of a recipe

Train it further: model.name_or_path=folder adapter.method=full; or put an adapter on it like on any
base."""


def add_command(commands: Any, style: Any) -> None:
    """Add `vlora from-dense` to the parser of `glora-llm`."""
    vlora = commands.add_parser("vlora", help="make a VLoRA model", description=VLORA, formatter_class=style)
    actions = vlora.add_subparsers(title="actions", metavar="ACTION", required=True)
    command = actions.add_parser("from-dense", help="of a dense model", description=VLORA, formatter_class=style)
    command.add_argument("model", metavar="MODEL", help="as model.name_or_path: a folder, a hub id, embedded:NAME")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--rank", metavar="R", help="r, or full; of several, 8,16, the first is written")
    what.add_argument("--budget", metavar="SHARE", help="of the linears' parameters, above 0 and below 1")
    command.add_argument("--layers-per-compound", metavar="K", help="with --rank: k, or all (default: 4)")
    command.add_argument("--topology", choices=VLORA_CHOICES["topology"], help="with --rank (default: chain)")
    command.add_argument("--base", choices=BASES, help="with --rank: the first layer, or the mean (default: first)")
    command.add_argument("--targets", metavar="NAMES", help="linears inside a layer, as q_proj,v_proj (default: all)")
    command.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="the folder to write; of --budget a run"
    )
    command.add_argument("--data", metavar="FILE", help="with --budget: text to train on, as data.source")
    command.add_argument("--steps", metavar="N", help="with --budget: optimizer steps")
    command.add_argument("--distill", action="store_true", help="with --budget: learn from the dense model too")
    command.add_argument("overrides", metavar="section.key=value", nargs="*", help="with --budget: of the recipe")
    command.set_defaults(command=from_dense)
    add_twin(actions, style)
    add_show(actions, style)


def from_dense(arguments: argparse.Namespace) -> int:
    """Run `glora-llm vlora from-dense`."""
    if arguments.budget is not None:
        return train_smaller(arguments)
    if arguments.data or arguments.steps or arguments.distill or arguments.overrides:
        raise UserError("--data, --steps, --distill and overrides train a model of --budget SHARE; --rank writes one.")
    ranks = [None if part == "full" else whole_number(part, "--rank") for part in arguments.rank.split(",")]
    given = arguments.layers_per_compound or "4"
    size = None if given == "all" else whole_number(given, "--layers-per-compound")
    from glora_llm.launch.quiet import quiet_libraries

    quiet_libraries()
    from glora_llm.models.from_dense import from_dense_command
    from glora_llm.vlora import VLoRAConfig

    targets = None if arguments.targets is None else arguments.targets.split(",")
    base = arguments.base or BASES[0]
    adding = "all" if base == "mean" else "next"  # a layer whose weight is the base could not leave the mean
    config = VLoRAConfig(targets, size, topology=arguments.topology or "chain", increments=adding)
    from_dense_command(arguments.model, config, ranks, arguments.out, base)
    return 0
