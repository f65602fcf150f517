"""`glora-llm evaluate`: score a run on held-out records, or on benchmarks by lm-eval."""

import argparse
from pathlib import Path
from typing import Any

from glora_llm.errors import UserError
from glora_llm.plan.run_folder import RunFolder

EVALUATE = """\
Score a run on its own held-out records; with --tasks a run, or any model, on tasks of lm-eval
(pip install 'glora-llm[eval]').

examples:
  glora-llm evaluate runs/quickstart                  the test records
  glora-llm evaluate runs/quickstart --split validation
  glora-llm evaluate runs/quickstart --step 200       a kept checkpoint instead of the end
  glora-llm evaluate runs/quickstart --merged merged  the merged model, same records
  glora-llm evaluate runs/quickstart data.test=other.jsonl  other records, or the run's own moved
  glora-llm evaluate runs/llama2_glora --tasks arc_challenge,hellaswag --few-shot 10 --gpus all
  glora-llm evaluate meta-llama/Llama-2-7b-hf --tasks mmlu --limit 100
  glora-llm evaluate runs/mine --task-folder examples/lm_eval --tasks capitals"""


def add_command(commands: Any, style: Any) -> None:
    """Add `evaluate` to the parser of `glora-llm`."""
    command = commands.add_parser("evaluate", help="score a run", description=EVALUATE, formatter_class=style)
    command.add_argument("run", metavar="RUN|MODEL", type=Path, help="the run folder; with --tasks also a model")
    command.add_argument("--split", choices=("test", "validation"), help="records to score (default: test)")
    command.add_argument("--merged", metavar="DIR", type=Path, help="score this merged model instead of the adapter")
    command.add_argument(
        "--step", metavar="N", type=int, help="score the checkpoint of this step (default: the end of the run)"
    )
    command.add_argument("--best", action="store_true", help="score what validated best (evaluation.keep_best)")
    command.add_argument("--genome", metavar="FILE", type=Path, help="of a supernet (default: RUN/genome.json)")
    command.add_argument("overrides", metavar="data.KEY=VALUE", nargs="*", help="where the records are now")
    asked = command.add_argument_group("benchmarks, by lm-eval")
    asked.add_argument("--tasks", metavar="NAMES", help="tasks or groups, by commas; `lm-eval ls tasks` lists them")
    asked.add_argument("--task-folder", metavar="DIR", type=Path, help="YAML tasks of your own (docs/evaluation.md)")
    asked.add_argument("--few-shot", metavar="N", type=int, help="examples before each question (default: the task's)")
    asked.add_argument("--limit", metavar="N", type=int, help="the first N questions of each task (default: all)")
    asked.add_argument("--batch", metavar="N", type=int, help="requests of one forward pass (default: 8)")
    asked.add_argument("--seed", metavar="N", type=int, help="of few-shot examples and all else (default: lm-eval's)")
    asked.add_argument("--gpus", metavar="N", help="processes to start here, one a GPU (or on the CPU), or all")
    asked.add_argument("--out", metavar="FILE", type=Path, help="of the results (default: RUN/eval/NAME.json)")
    command.set_defaults(command=evaluate)


OF_TASKS = ("task_folder", "few_shot", "limit", "batch", "seed", "gpus", "out")


def evaluate(arguments: argparse.Namespace) -> int:
    """Run `glora-llm evaluate`."""
    if arguments.tasks is not None:
        return _benchmarks(arguments)
    given = [name for name in OF_TASKS if getattr(arguments, name) is not None]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} is for tasks of lm-eval: give --tasks NAMES too.")
    _check_weights(arguments)
    folder = RunFolder(arguments.run, tuple(arguments.overrides))
    folder.recipe()  # is it a run? Before the slow imports
    from glora_llm.launch.quiet import quiet_libraries

    quiet_libraries()
    from glora_llm.evaluation.scoring import evaluate_run

    evaluate_run(folder, arguments.split or "test", arguments.merged, arguments.genome, _step(arguments))
    return 0


def _step(arguments: argparse.Namespace) -> int | None:
    """Return the checkpoint that --step or --best names; None: the end of the run."""
    if not arguments.best:
        return arguments.step  # type: ignore[no-any-return]
    from glora_llm.plan.trained_weights import best_step

    return best_step(RunFolder(arguments.run))


def _benchmarks(arguments: argparse.Namespace) -> int:
    """Score tasks of lm-eval, on as many processes as --gpus says."""
    tasks = _checked(arguments)
    if arguments.gpus is not None:
        from glora_llm.launch import start

        start.require_no_launcher()
        processes = start.local_processes(arguments.gpus)
        if processes > 1:
            return start.run_here(processes, _command_line(arguments))
    from glora_llm.launch.quiet import quiet_libraries

    quiet_libraries()
    from glora_llm.evaluation.benchmarks import BATCH, Questions, Weights, evaluate_tasks

    questions = Questions(
        tasks, arguments.few_shot, arguments.limit, arguments.task_folder, arguments.batch or BATCH, arguments.seed
    )
    weights = Weights(arguments.merged, _step(arguments), arguments.genome)
    evaluate_tasks(arguments.run, questions, weights, arguments.out)
    return 0


def _checked(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return the names of the tasks, after checks that load nothing.

    Raises:
        UserError: for what cannot be meant.
    """
    tasks = tuple(dict.fromkeys(name.strip() for name in arguments.tasks.split(",") if name.strip()))
    if not tasks:
        raise UserError("--tasks names nothing; expected names of tasks, as: --tasks arc_easy,hellaswag.")
    if arguments.split is not None or arguments.overrides:
        what = "--split" if arguments.split is not None else arguments.overrides[0]
        raise UserError(f"{what} is about the run's own records, and --tasks about those of lm-eval: leave one out.")
    for name, least in (("few_shot", 0), ("limit", 1), ("batch", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; expected a number of at least {least}.")
    _check_weights(arguments)
    if arguments.task_folder is not None and not arguments.task_folder.is_dir():
        raise UserError(f"--task-folder {arguments.task_folder} is no folder; expected one with YAML files of tasks.")
    if arguments.run.is_dir() and not any((arguments.run / name).exists() for name in ("recipe.yaml", "config.json")):
        raise UserError(f"{arguments.run} is neither a run (it has no recipe.yaml) nor a model (no config.json).")
    return tasks


def _check_weights(arguments: argparse.Namespace) -> None:
    """Check that at most one of --merged, --step and --best says which weights are scored.

    Raises:
        UserError: naming two that do.
    """
    given = {"merged": arguments.merged, "step": arguments.step, "best": arguments.best or None}
    chosen = [f"--{name}" for name, value in given.items() if value is not None]
    if arguments.tasks is not None and arguments.genome is not None and arguments.merged is not None:
        chosen = ["--merged", "--genome"]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} each say which weights are scored: give one of them.")


def _command_line(arguments: argparse.Namespace) -> list[str]:
    """Return the words of this command for each process of the launch."""
    words = ["evaluate", str(arguments.run)]
    for name in ("tasks", "task_folder", "few_shot", "limit", "batch", "seed", "out", "merged", "step", "genome"):
        value = getattr(arguments, name)
        words += [] if value is None else [f"--{name.replace('_', '-')}={value}"]
    return [*words, *(["--best"] if arguments.best else [])]
