"""The supernet's draws, a function of (seed, step, micro step, layer): ranks agree, and a resumed run repeats them."""

import random
from collections.abc import Mapping

from glora_llm.glora.layer import GLoRALinear
from glora_llm.glora.path import LayerPath, slots_with
from glora_llm.glora.supernet import SlotChoices, largest_path


def draw_path(choices: SlotChoices, has_bias: bool, *stream: object) -> LayerPath:
    """Draw one layer's path: for each slot a mode, each alike, then a rank of it.

    Args:
        choices: slot -> what it may be; D is left out where the layer has no bias.
        stream: what the draw depends on: seed, step, micro step, name of the layer, and the rank where ranks differ.
    """
    generator = random.Random("/".join(map(str, stream)))
    drawn = []
    for slot in slots_with(has_bias):
        specs = choices[slot]
        mode = generator.choice(list(dict.fromkeys(spec.mode for spec in specs)))
        spec = generator.choice([spec for spec in specs if spec.mode == mode])
        if mode != "none":
            drawn.append((slot, spec))
    return LayerPath(tuple(drawn))


class Supernet:
    """Draws the paths of a model's layers.

    Args:
        layers: by name.
        seed: of the run.
        rank: of this process where ranks draw differently; None: all draw the same.
    """

    def __init__(self, layers: Mapping[str, GLoRALinear], seed: int, rank: int | None = None):
        self.layers, self.seed, self.rank = layers, seed, rank

    def draw(self, step: int, micro_step: int) -> None:
        """Give every layer a path for one micro step."""
        end = () if self.rank is None else (self.rank,)
        for name, layer in self.layers.items():
            stream = (self.seed, step, micro_step, name, *end)
            layer.path["default"] = draw_path(layer.choices["default"], layer.b0 is not None, *stream)

    def largest(self) -> None:
        """Give every layer the largest path: what is scored while nothing is searched."""
        for layer in self.layers.values():
            layer.path["default"] = largest_path(layer.choices["default"], layer.b0 is not None)
