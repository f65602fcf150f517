"""Learning rates of bases and increments: factors on training.lr by the part of the weight.

A rule from k and r, for optimizers whose step does not grow with the gradient (Adam and Muon move an entry by about
the learning rate): which factors move a layer's weight as training a dense model would?

- b: A has entries of variance 1 / (3 I) at the start, so a step of B changes an entry of s B A by about
  s lr sqrt(r / (3 I)), and the factor sqrt(3 I / r) / s makes that lr. A itself moves nothing while B is near zero: 1.
- base: k dense layers whose gradients are unlike move their mean, the part that they share, by lr / sqrt(k); if they
  are alike, by lr. The rule takes 1 / sqrt(k): increments do the rest.
- gain: 1, as norms have.

Not measured yet; without `vlora.lr_factors` all factors are 1.
"""

import math
from typing import NamedTuple

from torch import nn

from glora_llm.schema.vlora import VLoRARates
from glora_llm.vlora.layer import FACTORS, VLoRALinear, vlora_layers

PARTS = ("b", "a", "gain", "gain", "gain")  # of a rate, in the order of FACTORS


class Rate(NamedTuple):
    """Learning rate and weight decay of one parameter.

    Args:
        lr_factor: multiplies training.lr.
        decays: whether weight decay is for it (matrices alone decay).
    """

    lr_factor: float = 1.0
    decays: bool = True


def rates(model: nn.Module, given: VLoRARates | str | None, decay_increments: bool = True) -> dict[int, Rate]:
    """Return id of a parameter -> its rate, for every base and increment of a model.

    Args:
        given: factors, `auto` for the rule, or None: 1.
        decay_increments: whether weight decay is for increments too.
    """
    found: dict[int, Rate] = {}
    shared: dict[int, list[VLoRALinear]] = {}
    for layer in vlora_layers(model).values():
        shared.setdefault(id(layer.base_owner), []).append(layer)
        factors = _rule(layer) if given == "auto" else _given(given)
        for name, part in zip(FACTORS, PARTS, strict=True):
            parameter = layer._parameters[name]
            if parameter is not None:
                found[id(parameter)] = Rate(factors[part], decay_increments)
    for members in shared.values():
        owner = members[0].base_owner
        size = len(members) + isinstance(owner, nn.Linear)  # the first layer's own linear is the base
        factor = 1 / math.sqrt(size) if given == "auto" else _given(given)["base"]
        found[id(owner.weight)] = Rate(factor)
    return found


def _rule(layer: VLoRALinear) -> dict[str, float]:
    return {"a": 1.0, "gain": 1.0, "b": math.sqrt(3 * layer.in_features / layer.rank) / layer.scale}


def _given(given: VLoRARates | str | None) -> dict[str, float]:
    return (given if isinstance(given, VLoRARates) else VLoRARates()).model_dump()
