"""A structure within `adapter.budget` on a model without weights: as predictor uniform spends it, for counts and plans.

What gradients choose is not known before the start, but it costs about as much: the budget.
"""

from collections.abc import Mapping
from typing import Any

from glora_llm.errors import UserError
from glora_llm.glora.layer import GLoRALinear
from glora_llm.glora.path import Genome, LayerPath
from glora_llm.schema import AdapterSection
from glora_llm.schema.slots import SLOTS
from glora_llm.search.budget import cheapest, limits_of, read_budget, structure_choices, uniform
from glora_llm.search.space import LayerShape, Space


def structure_space(layers: Mapping[str, GLoRALinear], section: AdapterSection) -> Space:
    """Return what may be chosen: each slot of each layer with any rank up to adapter.rank.

    Raises:
        UserError: for a layer that is no linear.
    """
    for name, layer in layers.items():
        if type(layer) is not GLoRALinear:
            kind = type(layer.get_base_layer()).__name__
            raise UserError(
                f"adapter.budget chooses the slots of linears, and {name} is of kind {kind}. Leave it out of "
                "adapter.targets."
            )
    shapes = [LayerShape(n, layer.out_features, layer.in_features, layer.b0 is not None) for n, layer in layers.items()]
    return Space(shapes, structure_choices(section), section.composition)


def settle(model: Any, layers: Mapping[str, GLoRALinear], section: AdapterSection) -> None:
    """Give the layers of a PEFT model the structure that a budget of parameters is spent on evenly.

    With a limit in seconds or megabytes alone, or without slot B, the slots stay as they are: the most that may be
    chosen.

    Raises:
        UserError: for a budget below the smallest structure.
    """
    space = structure_space(layers, section)
    budgets = [budget for budget in read_budget(section.budget) if budget.unit == "parameters"]
    if not budgets:
        return
    limits = limits_of(space, budgets, {"parameters": space.parameters})
    if len(space.choices["B"]) == 1:
        return
    try:
        code = uniform(space, limits)
    except UserError:
        if section.predictor == "uniform":
            raise
        code = cheapest(space)  # gradients may choose what is below rank 1 of B
    give(model, layers, space.genome(code))


def give(model: Any, layers: Mapping[str, GLoRALinear], genome: Genome) -> None:
    """Replace the slots of all layers by those of a genome, untrained."""
    config = model.peft_config["default"]
    for name, layer in layers.items():
        for slot in SLOTS:
            modules = getattr(layer, f"slot_{slot}")
            if "default" in modules:
                del modules["default"]
        layer.update_layer("default", config, genome.get(name, LayerPath(())), None)
