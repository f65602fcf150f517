"""The layers of a run's model that share weights, read from its shapes: no weight is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from glora_llm.errors import UserError
from glora_llm.models.families import layers
from glora_llm.models.folder import read_sharing
from glora_llm.models.load import meta_model
from glora_llm.plan.run_folder import RunFolder
from glora_llm.plan.subjects import not_here, subject_here
from glora_llm.vlora import VLoRALinear, vlora_layers


@dataclass(frozen=True)
class SharedLinear:
    """One linear over all layers.

    Args:
        name: inside a layer.
        shape: (O, I).
        groups: numbers of the layers that share each base.
        adding: numbers of the layers that add an increment.
        rank: r of an increment.
        gains: of `row`, `column` and `diagonal`, those that an increment has.
        parameters: of bases, increments and gains; biases are no part of it.
        dense: what the weights of all these layers would have.
    """

    name: str
    shape: tuple[int, int]
    groups: list[list[int]]
    adding: list[int]
    rank: int
    gains: list[str]
    parameters: int
    dense: int


def shared_linears(run: RunFolder) -> list[SharedLinear]:
    """Return what the layers of a run's model share, in the order of a layer's linears.

    Raises:
        UserError: for a folder that is no run, or a run whose layers share nothing.
    """
    recipe = run.recipe()
    folder = run.model
    if not (folder / "config.json").is_file():  # it has not ended
        folder = subject_here(recipe, 1, not_here(recipe))[0]
    if read_sharing(folder) is None:
        raise UserError(
            f"The layers of {run.path}'s model share no weights. Give a run of a recipe with the section vlora, such "
            "as vlora_lm_tiny, or one that trains a VLoRA folder as a whole."
        )
    return shared_in(list(layers(meta_model(recipe.model, folder))))


def shared_in(stack: Sequence[nn.Module]) -> list[SharedLinear]:
    """Return what like layers share; nothing where no weight is shared."""
    numbers = {module: number for number, layer in enumerate(stack) for module in layer.modules()}
    found: dict[str, list[tuple[int, VLoRALinear]]] = {}
    for number, layer in enumerate(stack):
        for name, linear in vlora_layers(layer).items():
            found.setdefault(name, []).append((number, linear))
    order = [name for name, module in stack[0].named_modules() if isinstance(module, nn.Linear)]
    return [_shared_linear(name, found[name], numbers) for name in order if name in found]


def _shared_linear(name: str, members: list[tuple[int, VLoRALinear]], numbers: dict[nn.Module, int]) -> SharedLinear:
    groups: dict[nn.Module, set[int]] = {}
    for number, linear in members:
        groups.setdefault(linear.base_owner, {numbers[linear.base_owner]}).add(number)
    first = members[0][1]
    full = first.out_features * first.in_features
    return SharedLinear(
        name=name,
        shape=(first.out_features, first.in_features),
        groups=sorted(sorted(group) for group in groups.values()),
        adding=[number for number, _ in members],
        rank=first.rank,
        gains=[gain for gain in ("row", "column", "diagonal") if getattr(first, f"increment_{gain}") is not None],
        parameters=len(groups) * full + sum(f.numel() for _, linear in members for f in linear.factors()),
        dense=sum(len(group) for group in groups.values()) * full,
    )
