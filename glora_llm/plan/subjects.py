"""Find what a forecast needs: the model's configuration, and the data where they are on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING

from glora_llm.data.sources import find_path, names_of
from glora_llm.errors import UserError
from glora_llm.models.fingerprint import weight_files
from glora_llm.models.resolve import EMBEDDED_PREFIX, ResolvedModel, configuration_folder
from glora_llm.schema import Recipe

if TYPE_CHECKING:
    from glora_llm.plan.plan import Plan


def not_here(recipe: Recipe) -> str:
    """Return what of a recipe's model and data is not on this machine, as a clause; empty: all is."""
    for source in names_of(recipe.data.source):
        if not source.startswith("embedded:") and find_path(source) is None:
            return f"data.source {source} is not on this machine"
    name = recipe.model.name_or_path
    if name is None or name.startswith(EMBEDDED_PREFIX):
        return ""
    path = Path(name).expanduser()
    if not path.exists():
        return f"the tokenizer of {name} is not on this machine"
    if path.is_dir() and (path / "config.json").is_file():
        try:
            weight_files(path)
        except UserError:
            return f"{name} has no weights"
    return ""


def subject_here(recipe: Recipe, world_size: int, left_out: str) -> tuple[Path, "Plan | None"]:
    """Return the folder of a recipe's config.json, and its plan where model and data are on this machine.

    Args:
        left_out: what `not_here` gave.

    Raises:
        UserError: as `make_plan`; for models whose sizes follow from data that are not here; for a hub model without a
            network.
    """
    from glora_llm.plan.plan import make_plan

    if not left_out:
        plan = make_plan(recipe, weights=False, world_size=world_size)
        return plan.base.folder, plan
    if recipe.data.format == "images":
        raise UserError(
            f"{left_out}, and the size of images and the number of their classes follow from them. Give data that are "
            "here: data.source=FOLDER."
        )
    if recipe.model.config is not None:
        return _new_model(recipe, left_out), None
    folder = configuration_folder(recipe.model)
    if recipe.model.from_dense is not None:
        from glora_llm.models.from_dense import made_of_dense

        folder = made_of_dense(recipe.model, ResolvedModel(folder, "", None, str(folder)), (), weights=False).folder
    return folder, None


def _new_model(recipe: Recipe, left_out: str) -> Path:
    """Return the folder of a new language model without its tokenizer: N of `train:N` is its vocabulary."""
    from glora_llm.models.folder import new_config, new_folder
    from glora_llm.tasks.new_text import TRAIN

    wanted = recipe.model.tokenizer or ""
    number = wanted.removeprefix(TRAIN)
    if not (wanted.startswith(TRAIN) and number.isdecimal()) and "vocab_size" not in (recipe.model.config or {}):
        raise UserError(
            f"{left_out}, and the vocabulary follows from its tokenizer. Give model.tokenizer=train:N, or "
            "model.config.vocab_size."
        )
    given = {"vocab_size": int(number)} if number.isdecimal() else {}
    config = new_config(recipe.model, "text", given)
    return new_folder(config, recipe.vlora, recipe.training.seed, "without a tokenizer", lambda _: None)[0]
