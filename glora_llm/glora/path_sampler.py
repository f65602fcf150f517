"""The supernet's draws, a function of (seed, step, micro batch, layer).

Micro batches are counted in the order of the step's samples, over all processes: any number of processes trains the
same supernet, and a resumed run repeats its draws.
"""

import random
from collections.abc import Mapping

from glora_llm.glora.path import LayerPath
from glora_llm.glora.supernet import SearchedLayer, SlotChoices, largest_path, slots_of


def draw_path(choices: SlotChoices, has_bias: bool, *stream: object) -> LayerPath:
    """Draw one layer's path: for each slot a mode, each alike, then a rank of it.

    Args:
        choices: slot -> what it may be; D is left out where the layer has no bias.
        stream: what the draw depends on: seed, step, number of the micro batch, name of the layer.
    """
    generator = random.Random("/".join(map(str, stream)))
    drawn = []
    for slot in slots_of(choices, has_bias):
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
    """

    def __init__(self, layers: Mapping[str, SearchedLayer], seed: int):
        self.layers, self.seed = layers, seed

    def draw(self, step: int, number: int) -> None:
        """Give every layer a path for one micro batch.

        Args:
            number: of the micro batch among those of the step on all processes.
        """
        for name, layer in self.layers.items():
            stream = (self.seed, step, number, name)
            layer.path["default"] = draw_path(layer.choices["default"], layer.b0 is not None, *stream)

    def largest(self) -> None:
        """Give every layer the largest path: what is scored while nothing is searched."""
        for layer in self.layers.values():
            layer.path["default"] = largest_path(layer.choices["default"], layer.b0 is not None)
