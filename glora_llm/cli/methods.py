"""`glora-llm methods`: list the adapter methods."""

import argparse
from typing import Any

from glora_llm.adapters.methods import KINDS, METHODS, REFUSED

METHODS_HELP = """\
List the values of adapter.method: on which bases each trains, whether it merges into a plain
model, and where it comes from.

examples:
  glora-llm methods
  glora-llm train --recipe quickstart adapter.method=dora adapter.slots=null output.dir=runs/dora

Arguments of a method that a recipe has no key for go into adapter.peft, under PEFT's names
(docs/glora.md)."""


def add_command(commands: Any, style: Any) -> None:
    """Add `methods` to the parser of `glora-llm`."""
    command = commands.add_parser(
        "methods", help="list the adapter methods", description=METHODS_HELP, formatter_class=style
    )
    command.set_defaults(command=methods)


def methods(arguments: argparse.Namespace) -> int:
    """Run `glora-llm methods`."""
    print(f"{'method':<13} {'base':<22} {'merges':<8} source (a number: arXiv)")
    for name, method in METHODS.items():
        base = ", ".join(("dense", *method.quantised))
        merges = "no" if method.unmerged else "yes"
        print(f"{name:<13} {base:<22} {merges:<8} {method.source}")
    print(
        "\nEach trains language models, language models with a head (task: classification, regression) and image\n"
        "classifiers, under ZeRO 0 to 3. int8 bases do not go with ZeRO 3."
    )
    for name, method in METHODS.items():
        if set(method.kinds) != set(KINDS):
            print(f"\n{name} trains {' and '.join(KINDS[kind] for kind in method.kinds)} alone.", end="")
    for name, method in METHODS.items():
        if method.unmerged:
            print(f"\n{name} does not merge: {method.unmerged}.", end="")
    print("\n\ndo not train here:")
    for name, reason in REFUSED.items():
        print(f"  {name:<24} {reason}")
    return 0
