"""`glora-llm search`: choose the best path of every layer of a trained supernet."""

import argparse
from pathlib import Path
from typing import Any

from glora_llm.plan.run_folder import RunFolder

SEARCH = """\
Search a trained supernet (a run with adapter.paths=sample) for the best path of every layer within
a limit.

examples:
  glora-llm search runs/llama2_glora_search  with the `search` section of its recipe
  glora-llm search runs/llama2_glora_search --budget 1.0M,0.5M  a genome for each limit
  glora-llm search runs/llama2_glora_search search.strategy=evolution search.seed=1

Candidates are scored on validation records, never on test records. RUN/genome.json is the genome of
the first limit, readable and editable by hand: `glora-llm merge RUN` uses it. RUN/search/ has the
others, the archive and the pictures. A search that was stopped goes on where it was: the same
command again. On several processes: the command that trained."""


def add_command(commands: Any, style: Any) -> None:
    """Add `search` to the parser of `glora-llm`."""
    command = commands.add_parser("search", help="search a supernet", description=SEARCH, formatter_class=style)
    command.add_argument("run", metavar="RUN", type=Path, help="the run folder (output.dir of the recipe)")
    command.add_argument("--budget", metavar="LIMITS", help="search.budget: 0.5M, or several as 1.0M,0.5M")
    command.add_argument("overrides", metavar="search.key=value", nargs="*", help="changes to the search section")
    command.set_defaults(command=search)


def search(arguments: argparse.Namespace) -> int:
    """Run `glora-llm search`."""
    RunFolder(arguments.run).recipe()  # is it a run? Before the slow imports
    from glora_llm.launch.quiet import quiet_libraries

    quiet_libraries()
    from glora_llm.run.search import search_command

    budget = [f"search.budget={arguments.budget}"] if arguments.budget else []
    search_command(arguments.run, [*budget, *arguments.overrides])
    return 0
