"""`glora-llm methods`: list the adapter methods."""

import argparse
from collections.abc import Mapping
from typing import Any, TypeVar

from glora_llm.adapters.methods import KINDS, LINEAR_ALONE, METHODS, REFUSED
from glora_llm.adapters.prompt_arguments import PROMPT_METHODS

Value = TypeVar("Value")

METHODS_HELP = """\
List the values of adapter.method: on which bases each trains, whether it merges into a plain
model, and where it comes from.

examples:
  glora-llm methods
  glora-llm train --recipe quickstart adapter.method=dora adapter.slots=null output.dir=runs/dora

Arguments of a method that a recipe has no key for go into adapter.peft, under PEFT's names
(docs/glora.md). What each computes, and when to take which: docs/methods.md."""


def add_command(commands: Any, style: Any) -> None:
    """Add `methods` to the parser of `glora-llm`."""
    command = commands.add_parser(
        "methods", help="list the adapter methods", description=METHODS_HELP, formatter_class=style
    )
    command.set_defaults(command=methods)


def methods(arguments: argparse.Namespace) -> int:
    """Run `glora-llm methods`."""
    width = max(map(len, METHODS))
    print(f"{'method':<{width}} {'base':<22} {'merges':<8} source (a number: arXiv)")
    for name, method in METHODS.items():
        base = ", ".join(("dense", *method.quantised))
        merges = "no" if method.unmerged else "yes"
        print(f"{name:<{width}} {base:<22} {merges:<8} {method.source}")
    print(
        "\nEach trains language models, language models with a head (task: classification, regression) and image\n"
        "classifiers, where nothing else is said below, under ZeRO 0 to 3. int8 bases do not go with ZeRO 3."
    )
    of_some = {name: m.kinds for name, m in METHODS.items() if set(m.kinds) != set(KINDS)}
    for kinds, names in _by_value(of_some).items():
        print(f"\ntrain {' and '.join(KINDS[kind] for kind in kinds)} alone: {', '.join(names)}.", end="")
    print(f"\nnot on GPT-2's linears, which are transposed (Conv1D): {', '.join(LINEAR_ALONE)}.", end="")
    print(f"\nnot on encoders with a head (BERT): {', '.join(PROMPT_METHODS)}.", end="")
    for reason, names in _by_value({name: m.unmerged for name, m in METHODS.items() if m.unmerged}).items():
        print(f"\nno merge of {', '.join(names)}: {reason}.", end="")
    print("\n\ndo not train here:")
    for name, reason in REFUSED.items():
        print(f"  {name:<24} {reason}")
    return 0


def _by_value(values: Mapping[str, Value]) -> dict[Value, list[str]]:
    """Return the names of each value."""
    return {value: [name for name in values if values[name] == value] for value in values.values()}
