"""`glora-llm vlora twin`: the dense model whose file is as large as a VLoRA model's."""

import argparse
from pathlib import Path
from typing import Any

from glora_llm import recipe
from glora_llm.errors import UserError, whole_number
from glora_llm.schema import Recipe

TWIN = """\
Find the dense model that is saved in as many bytes as a VLoRA model: its honest rival. By width the
number of layers stays, by depth the hidden size; the feed-forward size takes up what is left. What
is printed is counted on the modules themselves. Where the data are on this machine, the vocabulary
is that of the recipe's tokenizer, else N of train:N. Nothing is trained.

examples:
  glora-llm vlora twin vlora_lm                          narrower
  glora-llm vlora twin runs/vlora_lm --by depth          of a run: shallower
  glora-llm vlora twin dense_lm --bytes 60000000         of a size, from any recipe of a new model
  glora-llm vlora twin vlora_lm_tiny vlora.rank=8        of a recipe with changes"""


def add_twin(actions: Any, style: Any) -> None:
    """Add `vlora twin` to the actions of `glora-llm vlora`."""
    command = actions.add_parser("twin", help="a dense model of equal bytes", description=TWIN, formatter_class=style)
    command.add_argument("recipe", metavar="RECIPE_OR_RUN", help="a recipe's name or file, or a run folder")
    command.add_argument("overrides", metavar="section.key=value", nargs="*", help="changes to the recipe")
    command.add_argument("--by", choices=("width", "depth"), default="width", help="what changes (default: width)")
    command.add_argument("--bytes", metavar="N", help="of the twin's float32 weights (default: the model's own)")
    command.add_argument("--multiple", metavar="N", default="8", help="of which its sizes are multiples (default: 8)")
    command.set_defaults(command=twin)


def twin(arguments: argparse.Namespace) -> int:
    """Run `glora-llm vlora twin`."""
    multiple = whole_number(arguments.multiple, "--multiple")
    size = None if arguments.bytes is None else whole_number(arguments.bytes, "--bytes")
    name, checked = _recipe(arguments.recipe, arguments.overrides)
    if checked.model.config is None:
        raise UserError(
            f"{name} starts from {checked.model.name_or_path}, and a twin is a new model of another shape: give a "
            "recipe with model.config."
        )
    if checked.vlora is None and size is None:
        raise UserError(f"{name} is dense, so it is its own twin. Give a recipe with the section vlora, or --bytes N.")
    from glora_llm.launch.quiet import quiet_libraries

    quiet_libraries()
    from glora_llm.plan.equal_bytes import print_twin

    print_twin(name, checked, arguments.by, size, multiple)
    return 0


def _recipe(name: str, overrides: list[str]) -> tuple[str, Recipe]:
    if (Path(name) / "recipe.yaml").is_file():
        return name, recipe.load(str(Path(name) / "recipe.yaml"), overrides)
    return name, recipe.load(name, overrides)
