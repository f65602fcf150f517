"""`glora-llm evaluate`: score a run on held-out records."""

import argparse
from pathlib import Path
from typing import Any

from glora_llm.plan.run_folder import RunFolder

EVALUATE = """\
Score a run on held-out records: of the adapter on its base model, or of the merged model.

examples:
  glora-llm evaluate runs/quickstart                  the test records
  glora-llm evaluate runs/quickstart --split validation
  glora-llm evaluate runs/quickstart --step 200       a kept checkpoint instead of the end
  glora-llm evaluate runs/quickstart --merged merged  the merged model, same records
  glora-llm evaluate runs/quickstart data.test=other.jsonl  other records, or the run's own moved"""


def add_command(commands: Any, style: Any) -> None:
    """Add `evaluate` to the parser of `glora-llm`."""
    command = commands.add_parser("evaluate", help="score a run", description=EVALUATE, formatter_class=style)
    command.add_argument("run", metavar="RUN", type=Path, help="the run folder (output.dir of the recipe)")
    command.add_argument(
        "--split", default="test", choices=("test", "validation"), help="records to score (default: test)"
    )
    command.add_argument("--merged", metavar="DIR", type=Path, help="score this merged model instead of the adapter")
    command.add_argument(
        "--step", metavar="N", type=int, help="score the checkpoint of this step (default: the end of the run)"
    )
    command.add_argument("--genome", metavar="FILE", type=Path, help="of a supernet (default: RUN/genome.json)")
    command.add_argument("overrides", metavar="data.KEY=VALUE", nargs="*", help="where the records are now")
    command.set_defaults(command=evaluate)


def evaluate(arguments: argparse.Namespace) -> int:
    """Run `glora-llm evaluate`."""
    folder = RunFolder(arguments.run, tuple(arguments.overrides))
    folder.recipe()  # is it a run? Before the slow imports
    from glora_llm.launch.quiet import quiet_libraries

    quiet_libraries()
    from glora_llm.evaluation.scoring import evaluate_run

    evaluate_run(folder, arguments.split, arguments.merged, arguments.genome, arguments.step)
    return 0
