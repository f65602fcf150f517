"""`glora-llm recipes`: list and print recipes."""

import argparse
from typing import Any

from glora_llm import recipe
from glora_llm.errors import UserError

RECIPES = """\
List the recipes, or print one as it would be run: with every default, and with overrides applied.

examples:
  glora-llm recipes
  glora-llm recipes quickstart
  glora-llm recipes quickstart training.lr=1e-4 > recipes/mine.yaml
  glora-llm recipes --models  models for `model.name_or_path: embedded:NAME`

Recipes are looked for in ./recipes first, then in the package. A path to a YAML file serves as a
name too."""


def add_command(commands: Any, style: Any) -> None:
    """Add `recipes` to the parser of `glora-llm`."""
    command = commands.add_parser("recipes", help="list or print recipes", description=RECIPES, formatter_class=style)
    command.add_argument("name", metavar="NAME", nargs="?", help="print this recipe")
    command.add_argument("overrides", metavar="section.key=value", nargs="*", help="changes to it")
    command.add_argument("--models", action="store_true", help="list the models that a package ships")
    command.set_defaults(command=recipes)


def recipes(arguments: argparse.Namespace) -> int:
    """Run `glora-llm recipes`."""
    if arguments.models:
        from glora_llm.models import embedded

        _print_table({f"embedded:{name}": text for name, text in embedded.names().items()})
    elif arguments.name:
        print(recipe.dump(recipe.load(arguments.name, arguments.overrides)), end="")
    else:
        _print_table({name: _description(name) for name in sorted(recipe.named_recipes())})
    return 0


def _print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows), default=0)
    for name, text in rows.items():
        print(f"{name:<{width}}  {text}")


def _description(name: str) -> str:
    try:
        return recipe.load(name).description
    except UserError as error:
        return f"(does not load: {str(error).splitlines()[0]})"
