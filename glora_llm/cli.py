"""The commands `glora-llm ...` and `train.py`. Nothing heavy is imported before it is needed: help answers at once."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from glora_llm import __version__, recipe
from glora_llm.cli_making import add_making
from glora_llm.errors import CheckFailed, UserError
from glora_llm.run_folder import RunFolder

FAILED_CHECK, BAD_INPUT, INTERRUPTED = 1, 2, 130
SECONDS_FOR_THE_FIRST_RANK = 10

OVERVIEW = """\
GLoRA fine-tuning of quantised LLaMA-style models with DeepSpeed.

a first run, from nothing to a merged and scored model:
  glora-llm recipes                                     what there is to run
  deepspeed train.py --recipe quickstart                train, on every GPU
  glora-llm evaluate runs/quickstart                    score the adapter on the test rows
  glora-llm merge runs/quickstart --out merged          write a plain Hugging Face model
  glora-llm evaluate runs/quickstart --merged merged    score that one too

`glora-llm COMMAND --help` explains one command, with examples."""

TRAIN = """\
Train one recipe: a YAML file, with any of its keys changed on the command line.

examples:
  deepspeed train.py --recipe quickstart                             every GPU of this machine
  DS_ACCELERATOR=cpu deepspeed --num_gpus 2 train.py --recipe tiny_cpu    two processes on the CPU
  deepspeed train.py --recipe llama2_glora training.lr=1e-4 adapter.slots.A=none
  deepspeed train.py --recipe my/own.yaml output.dir=runs/mine
  glora-llm train --recipe llama2_glora --dry-run                    check everything, train nothing

The same command again goes on from the newest complete checkpoint of output.dir.
A value is written as in YAML: training.lr=1e-4, merge.after_training=true, 'adapter.targets=[q_proj, v_proj]'.
docs/recipe_reference.md lists every key."""

MERGE = """\
Write the trained adapter into the model, or write it as a plain LoRA, and check that both answer alike.

examples:
  glora-llm merge runs/llama2_glora --out merged                     loads in stock transformers
  glora-llm merge runs/llama2_glora --out lora --to lora             exact, as a PEFT LoRA adapter
  glora-llm merge runs/llama2_glora --out merged --quantize nf4      4-bit again; reports what that costs
  glora-llm merge runs/llama2_glora --out merged --step 400          a kept checkpoint instead of the last

A merge that changes the answers by more than the recipe's merge.* bounds ends with exit code 1."""

SEARCH = """\
Search a trained supernet (a run with adapter.paths=sample) for the best path of every layer within a limit.

examples:
  glora-llm search runs/llama2_glora_search                          with the `search` section of its recipe
  glora-llm search runs/llama2_glora_search --budget 1.0M,0.5M,0.25M one genome for each limit, from one supernet
  glora-llm search runs/llama2_glora_search search.strategy=evolution search.seed=1

Candidates are scored on validation rows, never on test rows. RUN/genome.json is the genome of the first limit, readable
and editable by hand: `glora-llm merge RUN` uses it. RUN/search/ has the others, the archive and the pictures.
A search that was stopped goes on where it was: the same command again. On several ranks: the command that trained."""

EVALUATE = """\
Score a run on held-out rows: of the adapter on its base model, or of the merged model.

examples:
  glora-llm evaluate runs/quickstart                                 the test rows
  glora-llm evaluate runs/quickstart --split validation
  glora-llm evaluate runs/quickstart --merged merged                 the merged model, same rows"""

RECIPES = """\
List the recipes, or print one as it would be run: with every default, and with overrides applied.

examples:
  glora-llm recipes
  glora-llm recipes quickstart
  glora-llm recipes quickstart training.lr=1e-4 > recipes/mine.yaml
  glora-llm recipes --models                                         models for `model.name_or_path: embedded:NAME`

Recipes are looked for in ./recipes first, then in the package. A path to a YAML file serves as a name too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `glora-llm` and return its exit code."""
    arguments = parsed(command_parser(), argv)
    return guarded(lambda: arguments.command(arguments))


def train_main(argv: Sequence[str] | None = None) -> int:
    """Run `train.py`, one rank of `glora-llm train`, and return its exit code."""
    parser = argparse.ArgumentParser("train.py", description=TRAIN, formatter_class=argparse.RawTextHelpFormatter)
    add_train_arguments(parser)
    arguments = parsed(parser, argv)
    return guarded(lambda: train(arguments))


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; overrides may stand behind options too, where argparse itself takes no positional."""
    arguments, rest = parser.parse_known_args(argv)
    if any(text.startswith("-") or "=" not in text for text in rest) or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def guarded(task: Callable[[], int]) -> int:
    """Run `task` and return its exit code; what a user may cause becomes one message instead of a traceback.

    2: bad input (UserError); 1: a result outside its bound (CheckFailed); 130: interrupted. All else is a defect and
    keeps its traceback.
    """
    try:
        return task()
    except UserError as error:
        _complain(str(error))
        return BAD_INPUT
    except CheckFailed as error:
        _complain(f"check failed: {error}")
        return FAILED_CHECK
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _complain(message: str) -> None:
    """Print an error once: ranks find the same one, so the others give the first time to end the launch."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"error: {message}", file=sys.stderr)
        return
    time.sleep(SECONDS_FOR_THE_FIRST_RANK)
    print(f"error (rank {rank}): {message}", file=sys.stderr)


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of `glora-llm`; each command stores the function that runs it."""
    style = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser("glora-llm", description=OVERVIEW, formatter_class=style)
    parser.add_argument("--version", action="version", version=f"glora-llm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = commands.add_parser("train", help="train a recipe", description=TRAIN, formatter_class=style)
    add_train_arguments(command)
    command.set_defaults(command=train)

    command = commands.add_parser("merge", help="write the merged model", description=MERGE, formatter_class=style)
    _add_merge_arguments(command)
    command.set_defaults(command=merge)

    command = commands.add_parser("search", help="search a supernet", description=SEARCH, formatter_class=style)
    command.add_argument("run", metavar="RUN", type=Path, help="the run folder (output.dir of the recipe)")
    command.add_argument("--budget", metavar="LIMITS", help="search.budget: 0.5M, or several as 1.0M,0.5M")
    command.add_argument("overrides", metavar="search.key=value", nargs="*", help="changes to the search section")
    command.set_defaults(command=search)

    command = commands.add_parser("evaluate", help="score a run", description=EVALUATE, formatter_class=style)
    command.add_argument("run", metavar="RUN", type=Path, help="the run folder (output.dir of the recipe)")
    command.add_argument(
        "--split", default="test", choices=("test", "validation"), help="rows to score (default: test)"
    )
    command.add_argument("--merged", metavar="DIR", type=Path, help="score this merged model instead of the adapter")
    command.add_argument("--genome", metavar="FILE", type=Path, help="of a supernet (default: RUN/genome.json)")
    command.set_defaults(command=evaluate)

    add_making(commands, style)

    command = commands.add_parser("recipes", help="list or print recipes", description=RECIPES, formatter_class=style)
    command.add_argument("name", metavar="NAME", nargs="?", help="print this recipe")
    command.add_argument("overrides", metavar="section.key=value", nargs="*", help="changes to it")
    command.add_argument("--models", action="store_true", help="list the models that a package ships")
    command.set_defaults(command=recipes)
    return parser


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `train.py` and `glora-llm train` both take."""
    parser.add_argument("--recipe", metavar="NAME", required=True, help="a recipe's name, or the path of a YAML file")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="changes to the recipe")
    parser.add_argument("--dry-run", action="store_true", help="check recipe, data, targets and batch; train nothing")
    # DeepSpeed's launcher adds it; the rank itself is read from the environment.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)


def _add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="the run folder (output.dir of the recipe)")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to write")
    parser.add_argument("--to", choices=("model", "lora"), default="model", help="a whole model (default) or a LoRA")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the written weights (default: the recipe's)"
    )
    parser.add_argument("--quantize", choices=("none", "nf4"), help="quantise the result (default: the recipe's)")
    parser.add_argument("--genome", metavar="FILE", type=Path, help="of a supernet (default: RUN/genome.json)")
    parser.add_argument("--step", metavar="N", type=int, help="merge the checkpoint of this step (default: the last)")


def train(arguments: argparse.Namespace) -> int:
    """Run `glora-llm train`."""
    checked = recipe.load(arguments.recipe, arguments.overrides)  # before the slow imports: a typo answers at once
    from glora_llm.quiet import quiet_libraries

    quiet_libraries()
    from glora_llm import run

    run.train(checked, dry_run=arguments.dry_run)
    return 0


def merge(arguments: argparse.Namespace) -> int:
    """Run `glora-llm merge`."""
    RunFolder(arguments.run).recipe()  # is it a run? Before the slow imports
    from glora_llm.quiet import quiet_libraries

    quiet_libraries()
    from glora_llm.merge.command import merge_run

    a = arguments
    merge_run(a.run, a.out, a.dtype, a.to, a.quantize, a.step, a.genome)
    return 0


def search(arguments: argparse.Namespace) -> int:
    """Run `glora-llm search`."""
    RunFolder(arguments.run).recipe()  # is it a run? Before the slow imports
    from glora_llm.quiet import quiet_libraries

    quiet_libraries()
    from glora_llm.search_run import search_command

    budget = [f"search.budget={arguments.budget}"] if arguments.budget else []
    search_command(arguments.run, [*budget, *arguments.overrides])
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Run `glora-llm evaluate`."""
    RunFolder(arguments.run).recipe()  # is it a run? Before the slow imports
    from glora_llm.quiet import quiet_libraries

    quiet_libraries()
    from glora_llm.evaluation.command import evaluate_run

    evaluate_run(arguments.run, arguments.split, arguments.merged, arguments.genome)
    return 0


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


if __name__ == "__main__":
    raise SystemExit(main())
