"""`glora-llm vlora from-dense MODEL --budget`: a smaller model of a dense one, trained on, as an ordinary run."""

import argparse
from pathlib import Path
from typing import Any

from glora_llm import recipe as recipes
from glora_llm.errors import CheckFailed, UserError, number_above_zero, whole_number
from glora_llm.schema import Recipe

SHARE, SMALL_SHARE, SMALL_TEXT = 0.02, 0.1, 1_000_000  # of the rows, of a file of fewer bytes


def train_smaller(arguments: argparse.Namespace) -> int:
    """Make a dense model into VLoRA under a budget and train it on; the same command goes on with a run."""
    checked = smaller_recipe(arguments)
    from glora_llm.cli.train import train_checked
    from glora_llm.plan.run_folder import RunFolder
    from glora_llm.report.from_dense import print_losses

    folder = RunFolder(Path(checked.output.dir))
    try:
        code = train_checked(checked)
    except CheckFailed:  # of the merged model; what training came to is known by then
        print_losses(folder)
        raise
    print_losses(folder)
    return code


def smaller_recipe(arguments: argparse.Namespace) -> Recipe:
    """Return the recipe that the options come to.

    Raises:
        UserError: for options that do not fit, and everything that a recipe refuses.
    """
    unused = {"--layers-per-compound": arguments.layers_per_compound, "--topology": arguments.topology,
              "--base": arguments.base}  # fmt: skip
    for option, given in unused.items():
        if given is not None:
            raise UserError(
                f"{option} is for --rank: with --budget the layers that share follow from what each would lose, and "
                f"their base is the mean. Take {option} away, or give --rank R in place of --budget."
            )
    if arguments.data is None:
        what = "--distill learns from a teacher's answers to" if arguments.distill else "--budget trains on"
        raise UserError(f"{what} text: give --data FILE (or a recipe with model.from_dense).")
    if arguments.steps is None:
        raise UserError("--budget trains the smaller model on: give --steps N, the optimizer steps.")
    steps = whole_number(arguments.steps, "--steps")
    budget = number_above_zero(arguments.budget, "--budget", "a share of the linears' parameters, such as 0.5")
    training: dict[str, Any] = {"global_batch": 16, "micro_batch": 4, "steps": steps, "lr": 5e-4, "warmup": 0.05}
    if arguments.distill:
        training["distill"] = {"teacher": arguments.model}
    dense: dict[str, Any] = {"budget": budget}
    if arguments.targets is not None:
        dense["targets"] = arguments.targets.split(",")
    values: dict[str, Any] = {
        "description": f"{arguments.model} at {arguments.budget} of its linears, trained on",
        "model": {"name_or_path": arguments.model, "from_dense": dense},
        "adapter": {"method": "full"},
        "data": {"format": "text", "source": arguments.data, "validation": _held_out(arguments.data), "max_tokens": 512,
                 "overlong": "split", "packing": True},
        "training": training,
        "evaluation": {"every": max(1, steps // 10), "batch": 4},
        # A model that is far from its teacher yet is unsure of most tokens: in bfloat16 the best one of 4 % changes.
        "merge": {"after_training": True, "dtype": "float32"},
        "output": {"dir": str(arguments.out), "save_every": max(1, steps // 10), "keep": 2},
    }  # fmt: skip
    checked = recipes.from_values(values, arguments.overrides, "vlora from-dense")
    if checked.model.from_dense is None:
        raise UserError(
            "model.from_dense=null would train the dense model as it is. Take it away, or train with `glora-llm train`."
        )
    return checked


def _held_out(source: str) -> float | str:
    """Return data.validation of a source that was given alone: its own split, or a share that comes to a row at least.

    Plain text is cut into rows of about 16,000 characters, so a small file has few.
    """
    from glora_llm.data.local_sources import EMBEDDED

    if "validation" in EMBEDDED.get(source.removeprefix("embedded:"), ()) and source.startswith("embedded:"):
        return "validation"
    file = Path(source).expanduser()
    return SMALL_SHARE if file.is_file() and file.stat().st_size < SMALL_TEXT else SHARE
