"""`glora-llm compare`: compare adapter methods at equal cost."""

import argparse
from pathlib import Path
from typing import Any

COMPARE = """\
Compare adapter methods on one recipe: each at the same number of trained parameters (or seconds of
training), at its own best learning rate, on several seeds. The rate is chosen on validation rows
with the first seed, the worse half of the rates is stopped after a third of the steps, and the test
rows are scored once for each final run. --race stops the worse half of the methods too, at some of
the validations: one is tested. lora@q_proj+v_proj: a method on these modules.

examples:
  glora-llm compare --recipe tiny_cpu --methods lora,glora --budget 10k --seeds 2
  glora-llm compare --recipe smollm2_glora --methods lora,rslora,dora,glora,glora:hira \\
      --budget 2M --seeds 3 --score exact_match
  glora-llm compare --recipe smollm2_glora --methods lora,glora --time 600 --rates 1e-3,2e-3,5e-3
  glora-llm compare --recipe tiny_cpu --race --budget 5k --methods lora,glora,lora@q_proj+v_proj

The same command again goes on, and reuses finished trials. OUT/comparison.json holds the table,
OUT/trials/ the runs: watch, evaluate, merge them. docs/compare.md: how to read the table."""


def add_command(commands: Any, style: Any) -> None:
    """Add `compare` to the parser of `glora-llm`."""
    command = commands.add_parser("compare", help="compare methods", description=COMPARE, formatter_class=style)
    command.add_argument("--recipe", metavar="NAME", required=True, help="a recipe's name, or the path of a YAML file")
    command.add_argument(
        "--methods", metavar="LIST", required=True, help="METHOD, glora:PRESET or :PREDICTOR, each @TARGETS"
    )
    cost = command.add_mutually_exclusive_group(required=True)
    cost.add_argument("--budget", metavar="N", help="trained parameters of each method, such as 0.3M")
    cost.add_argument("--time", metavar="SECONDS", help="of training, at the recipe's rank")
    command.add_argument("--nearest", action="store_true", help="let methods in that come no nearer than 25 %% to it")
    command.add_argument("--race", action="store_true", help="stop the worse half of the methods, and test one")
    command.add_argument("--seeds", metavar="N", default="3", help="from training.seed on (default: %(default)s)")
    command.add_argument("--rates", metavar="LIST", help="learning rates (default: 5e-4 to 2e-2), or auto")
    command.add_argument("--full-rates", metavar="LIST", help="of full and osf (default: 1e-5 to 5e-4)")
    command.add_argument("--score", metavar="NAME", help="that decides (default: the benchmark's first, else loss)")
    command.add_argument("--forgetting", metavar="SOURCE", help="other text (default: the shipped one), or none")
    command.add_argument("--out", metavar="DIR", type=Path, help="default: runs/compare-NAME")
    command.add_argument("--jobs", metavar="N", help="trials at once (default: one a GPU, or one a core)")
    command.add_argument("overrides", metavar="section.key=value", nargs="*", help="changes to the recipe")
    command.set_defaults(command=compare)


def compare(arguments: argparse.Namespace) -> int:
    """Run `glora-llm compare`."""
    from glora_llm.compare.request import check_request, read_request

    request = read_request(
        name=arguments.recipe,
        overrides=arguments.overrides,
        methods=arguments.methods,
        budget=arguments.budget,
        nearest=arguments.nearest,
        seconds=arguments.time,
        seeds=arguments.seeds,
        rates=arguments.rates,
        full_rates=arguments.full_rates,
        score=arguments.score,
        forgetting=arguments.forgetting,
        out=arguments.out,
        jobs=arguments.jobs,
        race=arguments.race,
    )
    check_request(request)
    from glora_llm.launch.quiet import quiet_libraries

    quiet_libraries()
    from glora_llm.compare.command import compare as run

    return run(request)
