"""Checks of a recipe that load no library: wrong names and paths are answered within a second, all at once."""

import os
import tempfile
from pathlib import Path

from glora_llm.adapters.fusion_sources import check_sources
from glora_llm.adapters.methods import check_method
from glora_llm.adapters.start import require_weights
from glora_llm.adapters.targets import require_names
from glora_llm.errors import Problems, UserError
from glora_llm.files.links import dangling
from glora_llm.models.resolve import look_at_model, stored_modules
from glora_llm.plan.other_text import check_other_text
from glora_llm.plan.run_folder import RunFolder
from glora_llm.schema import Recipe
from glora_llm.schema.scores import score_of
from glora_llm.training.deepspeed_config import accumulation, find_deepspeed_config
from glora_llm.training.trackers import require_trackers

LONGEST_SHOWN = 120  # characters of a path


def check_early(recipe: Recipe, world_size: int, data: bool = True, weights: bool = True) -> None:
    """Check names, paths and the batch of a recipe.

    Args:
        world_size: processes of the launch.
        data: False: the rows will not be read.
        weights: False: nor will the model's weights, which need not be there.

    Raises:
        UserError: with everything that is wrong.
    """
    from glora_llm.data.first_look import first_look  # numpy, which help can do without

    found = Problems()
    with found.collected():
        look_at_model(recipe.model)
    with found.collected():
        if recipe.training.distill is not None:
            look_at_model(recipe.training.distill.as_model())
    with found.collected():
        if data:
            first_look(recipe.data)
    with found.collected():
        if data:
            check_other_text(recipe)
    with found.collected():
        _check_from_dense(recipe)
    for name in recipe.evaluation.metrics or ():
        with found.collected():
            score_of(name)
    with found.collected():
        check_method(recipe.adapter)
    with found.collected():
        check_sources(recipe.adapter)
    with found.collected():
        if isinstance(recipe.evaluation.keep_best, str):
            score_of(recipe.evaluation.keep_best)
    with found.collected():
        if weights:
            _check_targets(recipe)
    with found.collected():
        require_trackers(recipe.output.trackers)
    for key in ("genome", "weights"):
        with found.collected():
            _require_there(f"adapter.{key}", getattr(recipe.adapter, key))
    with found.collected():
        _check_start(recipe.adapter.weights)
    with found.collected():
        find_deepspeed_config(recipe.training.deepspeed)
    with found.collected():
        accumulation(recipe.training, world_size)
    with found.collected():
        _require_writable(Path(recipe.output.dir))
        RunFolder(Path(recipe.output.dir)).require_whole()
    found.raise_all()


def _check_from_dense(recipe: Recipe) -> None:
    """Check that what the dense model is made into can be trained on, before it is made."""
    if recipe.model.from_dense is None:
        return
    if not recipe.adapter.is_full:
        raise UserError(
            f"model.from_dense makes a model whose weights are trained on, and adapter.method is "
            f"{recipe.adapter.method}. Set adapter.method=full; an adapter goes on the trained model: "
            "model.name_or_path=RUN/model."
        )
    if recipe.head or recipe.data.format in ("images", "multiple_choice"):
        raise UserError(
            f"model.from_dense is for text that is learnt token by token, and data.format is {recipe.data.format}. "
            "Use data.format=text, or another whose answers are text; then put a head or adapter on RUN/model."
        )


def _check_targets(recipe: Recipe) -> None:
    modules, linears = stored_modules(recipe.model)
    if modules:
        require_names(recipe.adapter, modules, {name.rpartition(".")[2] for name in linears})


def _check_start(weights: str | None) -> None:
    if weights is not None and Path(weights).exists():
        require_weights(Path(weights))


def _require_there(key: str, path: str | None) -> None:
    if path is not None and not Path(path).exists():
        raise UserError(f"{key}: there is no {path} (looked in {Path.cwd()}).{dangling(Path(path))}")


def _require_writable(folder: Path) -> None:
    """Check that a run folder is there and can be written to, or can be made."""
    try:
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
        if not there.is_dir():
            what = "a link to nowhere" if there.is_symlink() else "a file"
            raise UserError(f"output.dir {folder}: {there} is {what}, and a folder is expected there.")
        folder.exists()  # refuses a name that is too long
        Path(tempfile.mkdtemp(prefix=".writable-", dir=there)).rmdir()
    except (OSError, ValueError) as error:
        shown = str(folder) if len(str(folder)) <= LONGEST_SHOWN else f"{str(folder)[:LONGEST_SHOWN]}..."
        why = getattr(error, "strerror", None) or error
        raise UserError(f"output.dir {shown} cannot be made or written to: {why}. Choose another.") from error
