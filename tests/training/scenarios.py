"""What the workers of launched tests do for each scenario."""

from pathlib import Path

from glora_llm import recipe
from glora_llm.launch import ranks
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from glora_llm.run import train as run


def train_scenario(recipe_name: str, overrides: list[str], folder: Path, processes: ranks.Processes) -> None:
    """Train a recipe into `folder` on ranks that have met already."""
    checked = recipe.load(recipe_name, [*overrides, f"output.dir={folder}"])
    made = RunFolder(folder)
    if processes.is_main_process:
        made.write("recipe.yaml", recipe.dump(checked))
    run.train_plan(make_plan(checked, world_size=processes.world_size), made, processes)
