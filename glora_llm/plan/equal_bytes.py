"""Print the dense twin of a recipe: its sizes, its bytes, and what to type."""

from pathlib import Path
from typing import Any

from glora_llm.models.config_file import load_config
from glora_llm.models.load import meta_model
from glora_llm.plan.subjects import not_here, subject_here
from glora_llm.plan.twin import BYTES, Twin, count, find_twin
from glora_llm.schema import Recipe


def print_twin(name: str, recipe: Recipe, by: str, size: int | None, multiple: int) -> None:
    """Solve for the twin of a recipe and print it.

    Args:
        name: of the recipe, its file or its run folder.
        recipe: of a new model.
        by: `width` or `depth`.
        size: bytes of the twin's weights; None: those of the recipe's model.
        multiple: of which the twin's sizes are multiples.

    Raises:
        UserError: when there is no such model; for a recipe that cannot be resolved.
    """
    left_out = not_here(recipe)
    folder, _ = subject_here(recipe, 1, left_out)
    if left_out:
        print(f"{left_out}: the vocabulary is taken to be that of model.tokenizer {recipe.model.tokenizer}")
    config = load_config(folder)
    mine = sum(parameter.numel() for parameter in meta_model(recipe.model, folder).parameters())
    wanted = mine if size is None else max(1, round(size / BYTES))
    twin = find_twin(config, wanted, by, multiple)
    rows = [(name, mine), *([] if size is None else [("asked for", wanted)])]
    if recipe.vlora is not None:
        rows.append(("dense of the same shape", count(config)))
    rows.append((f"dense twin by {by}", twin.parameters))
    for title, number in rows:
        print(f"{title:28s} {number:>14,} parameters {BYTES * number:>16,} bytes")
    print(f"{'difference':28s} {twin.parameters - wanted:>+14,} parameters {100 * twin.difference:>+15.3f} %")
    print("\n".join(["", *_to_type(name, recipe, twin)]))


def overrides(recipe: Recipe, twin: Twin) -> list[str]:
    """Return the settings `model.config.KEY=VALUE` that make a recipe's model its twin, without those that follow."""
    given: dict[str, Any] = recipe.model.config or {}
    own = twin.shape.heads == twin.shape.groups  # keys and values have as many heads, as where the recipe says nothing
    follow = {"head_dim", *(["num_key_value_heads"] if own else [])} - given.keys()
    return [f"model.config.{key}={value}" for key, value in twin.settings.items() if key not in follow]


def _to_type(name: str, recipe: Recipe, twin: Twin) -> list[str]:
    """Return the command that trains the twin."""
    source = f"{name}/recipe.yaml" if Path(name).is_dir() else name
    vlora = ["vlora=null"] if recipe.vlora is not None else []
    last = f"output.dir={recipe.output.dir.rstrip('/')}_twin"
    words = [*vlora, *overrides(recipe, twin), last]
    return ["To train it:", f"  deepspeed train.py --recipe {source} {' '.join(words)}"]
