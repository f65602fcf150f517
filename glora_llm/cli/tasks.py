"""`glora-llm tasks`: list the benchmarks that a recipe can train and score on."""

import argparse
from typing import Any

from glora_llm.schema.benchmarks import BENCHMARKS, benchmark_of

TASKS = """\
List the data sets that `data.benchmark` knows: kind of task, main score, splits, source; or say all
of one. The benchmarks of lm-eval (`glora-llm evaluate --tasks`) are listed by `lm-eval ls tasks`.

examples:
  glora-llm tasks
  glora-llm tasks rte
  glora-llm recipes smollm2_glue            a recipe that trains on one of them

Data of your own need none of these names (docs/data_formats.md)."""


def add_command(commands: Any, style: Any) -> None:
    """Add `tasks` to the parser of `glora-llm`."""
    command = commands.add_parser("tasks", help="list the benchmarks", description=TASKS, formatter_class=style)
    command.add_argument("name", metavar="NAME", nargs="?", help="say all of this one")
    command.set_defaults(command=tasks)


def tasks(arguments: argparse.Namespace) -> int:
    """Run `glora-llm tasks`."""
    if arguments.name is not None:
        _print_one(arguments.name)
        return 0
    rows = [("task", "kind", "score", "train / validation / test", "source")]
    for name, benchmark in BENCHMARKS.items():
        source = " ".join(part for part in (benchmark.source, benchmark.subset) if part)
        rows.append((name, benchmark.kind, benchmark.metrics[0], _splits(name), source))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row[:4], widths, strict=True)), row[4]]))
    return 0


def _splits(name: str) -> str:
    benchmark = benchmark_of(name)
    return " / ".join(
        "-" if split is None else str(split) for split in (benchmark.train, benchmark.validation, benchmark.test)
    )


def _print_one(name: str) -> None:
    """Print what the catalogue says of one benchmark, and the keys of a recipe that it fills.

    Raises:
        UserError: for a name that is not in the catalogue.
    """
    benchmark = benchmark_of(name)
    about = {
        "task": name,
        "asks": benchmark.title,
        "kind": benchmark.kind,
        "scores": ", ".join(benchmark.metrics),
        "splits": f"{_splits(name)} (train / validation / test)",
        "paper": benchmark.paper,
    }
    for key, text in about.items():
        print(f"{key:<8} {text}")
    print("fills in the section data:")
    for key, value in benchmark.settings().items():
        print(f"  {key}: {value!r}")
