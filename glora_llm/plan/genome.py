"""One genome of a supernet as a plain adapter with inherited weights, and the recipes that train it further or anew."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from glora_llm.adapters import noah_sizes
from glora_llm.adapters.config import read_genome
from glora_llm.adapters.start import ADAPTER_WEIGHTS
from glora_llm.atomic import whole_folder
from glora_llm.errors import UserError
from glora_llm.glora.path import genome_to_slots
from glora_llm.glora.supernet import inherit
from glora_llm.plan.run_folder import RunFolder
from glora_llm.schema import Recipe, SearchSection

FINETUNED, RETRAINED = "finetuned", "retrained"  # folders inside of the run


def deployed(folder: RunFolder, adapter: Path, genome: Path | None = None) -> tuple[Recipe, Path]:
    """Return the recipe and the adapter folder that merge and evaluate use.

    Of a supernet that is the chosen genome: RUN/genome.json, as a search wrote it or as someone edited it.

    Args:
        adapter: the run's adapter, or one of a checkpoint.
        genome: another genome file.

    Raises:
        UserError: when a supernet has no genome, or a genome does not fit it, or is given for a plain run.
    """
    recipe = folder.recipe()
    if not recipe.adapter.is_supernet:
        if genome is not None:
            raise UserError(f"--genome is for a supernet, and {folder.path} is none (adapter.paths is not `sample`).")
        return recipe, adapter
    file = genome or folder.genome
    if not file.is_file():
        raise UserError(
            f"{folder.path} is a supernet, and there is no {file}: `glora-llm search {folder.path}` finds one."
        )
    out = folder.search / ("adapter" if genome is None else f"adapter-{genome.stem}")
    extract(adapter, file, out)
    section = recipe.adapter.model_copy(update={"paths": None, "supernet": None, "genome": str(file)})
    return recipe.model_copy(update={"adapter": section, "search": None}), out


def extract(supernet: Path, genome: Path, out: Path) -> None:
    """Write a PEFT folder with the weights that a genome inherits.

    Raises:
        UserError: when there is no supernet adapter, or the genome does not fit it or has no slot at all.
    """
    file = supernet / ADAPTER_WEIGHTS
    if not file.is_file():
        raise UserError(f"{supernet} holds no adapter: the run has not ended. Train on.")
    paths = read_genome(genome)
    config = json.loads((supernet / "adapter_config.json").read_text(encoding="utf-8"))
    inherited = noah_sizes.inherit if config["peft_type"] == noah_sizes.NoahConfig.own_type.value else inherit
    weights = inherited(load_file(file), paths)
    if not any(True for path in paths.values() for _ in path.active()):
        raise UserError(f"{genome}: every slot of every layer is none, and that is the base model as it was.")
    config |= {"supernet": None, "genome": genome_to_slots(paths)}
    with whole_folder(out) as place:
        save_file(weights, place / ADAPTER_WEIGHTS)
        (place / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def further_runs(recipe: Recipe) -> dict[str, int]:
    """Return what is trained after the search: folder inside of the run -> optimizer steps."""
    search = recipe.search
    steps = {} if search is None else {FINETUNED: search.finetune_steps, RETRAINED: search.retrain_steps}
    return {name: count for name, count in steps.items() if count}


def further_recipe(search: SearchSection, folder: RunFolder, name: str) -> Recipe:
    """Return the recipe that trains a search's genome in RUN/finetuned from the weights that it inherits, or in
    RUN/retrained from the start (one process calls this).

    The genome is copied there: another search, or an editor, may change RUN/genome.json.

    Args:
        search: of the launch, which may ask for other steps than the one before.
        name: FINETUNED or RETRAINED.

    Raises:
        UserError: as `deployed`, or when that run began with another genome.
    """
    steps = search.finetune_steps if name == FINETUNED else search.retrain_steps
    recipe, inherited = deployed(folder, folder.adapter)
    tuned, genome = RunFolder(folder.path / name), folder.genome.read_text(encoding="utf-8")
    if tuned.genome.is_file() and tuned.genome.read_text(encoding="utf-8") != genome:
        raise UserError(
            f"{tuned.path} was trained from another genome than {folder.genome} holds now. Delete {tuned.path}, or put "
            "that genome back."
        )
    tuned.write("genome.json", genome)
    weights = str(inherited) if name == FINETUNED else None
    training: dict[str, Any] = {"steps": steps, "epochs": None}
    if name == RETRAINED and search.retrain_lr is not None:
        training["lr"] = search.retrain_lr
    changes = {
        "adapter": recipe.adapter.model_copy(update={"genome": str(tuned.genome), "weights": weights}),
        "training": recipe.training.model_copy(update=training),
        "output": recipe.output.model_copy(update={"dir": str(tuned.path), "resume": "auto"}),
    }
    return recipe.model_copy(update=changes)
