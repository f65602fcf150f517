"""The teacher of a distillation: found, and checked against the model that learns, before any weight is loaded."""

from typing import Any

import torch

from glora_llm.errors import UserError
from glora_llm.models.config_file import load_config
from glora_llm.models.load import meta_model
from glora_llm.models.resolve import ResolvedModel, configuration_folder, resolve
from glora_llm.models.tokenizer import load_tokenizer
from glora_llm.plan.step_memory import quantized_shapes
from glora_llm.schema import DistillSection, Recipe
from glora_llm.tasks.text import TextTask


def find_teacher(recipe: Recipe, base: ResolvedModel, task: Any, weights: bool) -> ResolvedModel | None:
    """Return the teacher of a recipe, or None where it has none.

    Args:
        base: the model that learns.
        task: of the recipe.
        weights: False leaves the weights of a hub model where they are.

    Raises:
        UserError: for a task without tokens, a teacher that cannot be found, another tokenizer or vocabulary, and
            layers that cannot be compared.
    """
    settings, supernet = recipe.training.distill, recipe.adapter.supernet
    keys = {"training.distill": settings, "adapter.supernet.distill": supernet.distill if supernet else None}
    given = [key for key, value in keys.items() if value is not None]
    if given and type(task) is not TextTask:
        raise UserError(
            f"{given[0]} compares the logits of tokens, and this recipe learns no text by its next token "
            f"(data.format {recipe.data.format}, task {recipe.task}). Take it away: {given[0]}=null."
        )
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are two teachers of one model: set one of them to null.")
    if settings is None:
        return None
    found = resolve(settings.as_model(), weights)
    _check_tokenizers(task.tokenizer, load_tokenizer(found.folder), settings.teacher)
    _check_shapes(load_config(base.folder), load_config(found.folder), settings)
    return found


def teacher_bytes(recipe: Recipe, dtype: torch.dtype) -> int:
    """Return the bytes of the teacher's weights, which every process holds whole; 0 without one.

    Args:
        dtype: what `auto` comes to.

    Raises:
        UserError: when its configuration cannot be found.
    """
    settings = recipe.training.distill
    if settings is None:
        return 0
    dtype = dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    section = settings.as_model().model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    model = meta_model(section, configuration_folder(section))
    shapes = quantized_shapes(model, section)
    packed = {id(model.get_submodule(name).weight): shape for name, shape in shapes.items()}
    numbers = sum(packed[id(p)].stored if id(p) in packed else p.numel() for p in model.parameters())
    return numbers * dtype.itemsize + sum(shape.state_bytes for shape in shapes.values())


def _check_tokenizers(mine: Any, theirs: Any, teacher: str) -> None:
    """Check that both tokenizers give every token the same number: logits are compared number by number."""
    own, other = mine.get_vocab(), theirs.get_vocab()
    if own == other:
        return
    differing = min(own.items() ^ other.items(), key=lambda item: item[1])
    raise UserError(
        f"training.distill.teacher {teacher} has another tokenizer than the model: {len(other):,} tokens there, "
        f"{len(own):,} here, and {differing[0]!r} is number {other.get(differing[0])} there and "
        f"{own.get(differing[0])} here. Its logits are of other tokens: give a teacher of the same family."
    )


def _check_shapes(mine: Any, theirs: Any, settings: DistillSection) -> None:
    mine, theirs = mine.get_text_config(decoder=True), theirs.get_text_config(decoder=True)
    if mine.vocab_size != theirs.vocab_size:
        raise UserError(
            f"training.distill.teacher {settings.teacher} gives {theirs.vocab_size:,} logits and the model "
            f"{mine.vocab_size:,}. Give a teacher with the same vocab_size."
        )
    keys = ("num_hidden_layers", "hidden_size")
    here, there = ([getattr(config, key) for key in keys] for config in (mine, theirs))
    if settings.states and here != there:
        raise UserError(
            f"training.distill.states compares states layer by layer, and the teacher {settings.teacher} has "
            f"{there[0]} layers of width {there[1]}, the model {here[0]} of width {here[1]}. Set it to 0."
        )
