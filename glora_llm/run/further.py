"""Training after a search: of the genome, further from the weights that it inherits, or anew."""

from collections.abc import Callable
from pathlib import Path

from glora_llm.launch import ranks
from glora_llm.launch.ranks import Processes
from glora_llm.plan.genome import FINETUNED, further_recipe, further_runs
from glora_llm.plan.plan import Plan, make_plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.schema import Recipe


def train_further(
    recipe: Recipe, run: RunFolder, processes: Processes, train: Callable[[Plan, RunFolder], None]
) -> RunFolder:
    """Train the genome in folders inside of the run, and add their test scores to the run's summary.json.

    Args:
        recipe: of the run.
        train: trains a plan in a folder.

    Returns:
        the folder of what was trained last: the run's own where nothing is trained further.
    """
    folder, search = run, recipe.search
    for name in further_runs(recipe) if search else ():
        assert search is not None
        made = further_recipe(search, run, name) if processes.is_main_process else None
        tuned = ranks.broadcast(made, processes.device)
        folder = RunFolder(Path(tuned.output.dir))
        train(make_plan(tuned, world_size=processes.world_size), folder)
        if processes.is_main_process and "test" in folder.summary():
            run.update_summary({f"test_{name}": folder.summary()["test"]})
    return folder


def describe_further(recipe: Recipe, folder: RunFolder) -> list[str]:
    """Return how the genome is trained after a search that was a command of its own, a line for each way."""
    lines = []
    for name, steps in further_runs(recipe).items():
        key, how = ("finetune_steps", "further") if name == FINETUNED else ("retrain_steps", "from the start")
        lines.append(
            f"to train it {how}, in {folder.path / name}: glora-llm train --recipe {folder.path}/recipe.yaml "
            f"search.{key}={steps}"
        )
    return lines
