"""The recipe of a run where its data are not: on another machine, or read from another folder."""

from glora_llm.data.image_sources import locate_images
from glora_llm.data.sources import find_path, locate, locate_training
from glora_llm.errors import UserError
from glora_llm.plan.run_folder import DATA_KEYS, RunFolder
from glora_llm.schema import DataSection, Recipe

SHIPPED = "embedded:tinyshakespeare"  # text that the package ships
ANY_STEPS = 1000  # of a run that gives epochs: the schedule of a method may read them, what it learnt does not


def recipe_for_merge(folder: RunFolder, recipe: Recipe) -> Recipe:
    """Return a recipe with the model and adapter of a run, and with text that the package ships in place of its data.

    The data of images and of heads stay: they say how many classes the model has. So do those of a new model while they
    are there: its tokenizer may be trained on them.

    Args:
        recipe: what is merged; of a supernet with its genome.
    """
    if recipe.data.format == "images" or recipe.head:
        return recipe
    if recipe.model.config is not None or recipe.model.from_dense is not None:
        if _has_source(recipe.data) or not (folder.model / "config.json").is_file():
            return recipe
        recipe = _on_trained_model(folder, recipe)
    data = DataSection(
        format="text", source=SHIPPED, validation="validation", test=16, max_tokens=256, overlong="split", packing=True
    )
    steps = recipe.training.steps or folder.summary().get("steps") or ANY_STEPS
    training = recipe.training.model_copy(update={"steps": steps, "epochs": None})
    evaluation = recipe.evaluation.model_copy(update={"generate": None, "metrics": None})
    return recipe.model_copy(update={"data": data, "training": training, "evaluation": evaluation})


def recipe_for_scores(folder: RunFolder, recipe: Recipe, split: str) -> Recipe:
    """Return the recipe by which the rows of a split are scored; only they need to be here when they have a file.

    Raises:
        UserError: when neither data.source nor a file of that split is here, with the keys that say where they are.
    """
    if _has_source(recipe.data):
        return recipe
    held = getattr(recipe.data, split)
    places = list(held.values()) if isinstance(held, dict) else [held]
    if not all(isinstance(place, str) and find_path(place) is not None for place in places):
        raise UserError(
            f"{folder.path} was trained on data.source={recipe.data.source}, which is not here. Name the rows to "
            f"score: `glora-llm evaluate {folder.path} --split {split} data.{split}=FILE`; or, where they are drawn "
            "from the training rows, the new place of those: data.source=FILE. May be given: "
            f"{', '.join(sorted(DATA_KEYS))}."
        )
    if recipe.model.config is not None or recipe.model.from_dense is not None:
        recipe = _on_trained_model(folder, recipe)
    alone = {
        "source": places[0],
        "shots": None,
        "shots_seed": None,
        "split": split,
        "validation": None,
        "test": None,
        split: held,
        "max_rows": None,
    }
    off = {"every": None, "keep_best": False, "patience": None, "test_before": False}
    evaluation = recipe.evaluation.model_copy(update=off)
    data = recipe.data.model_copy(update=alone)
    return recipe.model_copy(update={"data": data, "evaluation": evaluation, "search": None})


def _has_source(data: DataSection) -> bool:
    """Tell whether the training data are here, or may be on the hub; nothing is read."""
    try:
        locate_training(data, locate_images if data.format == "images" else locate)
    except UserError:
        return False
    return True


def _on_trained_model(folder: RunFolder, recipe: Recipe) -> Recipe:
    """Return the recipe of a new model with the model that was trained in its place: it has the same tokenizer."""
    changes = {"name_or_path": str(folder.model), "config": None, "tokenizer": None, "from_dense": None}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=changes), "vlora": None})
