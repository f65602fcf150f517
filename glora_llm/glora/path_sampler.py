"""The supernet's draws, a function of (seed, step, micro batch, layer).

Micro batches are counted in the order of the step's samples, over all processes: any number of processes trains the
same supernet, and a resumed run repeats its draws.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from glora_llm.glora.path import LayerPath
from glora_llm.glora.supernet import SearchedLayer, SlotChoices, largest_path, slots_of, smallest_path

Odds = Mapping[Any, Mapping[Any, float]]  # slot -> mode -> how likely it is against the others; 1 where it is not here


def draw_path(choices: SlotChoices, has_bias: bool, *stream: object, odds: Odds | None = None) -> LayerPath:
    """Draw one layer's path: for each slot a mode, each alike or by its odds, then a rank of it.

    Args:
        choices: slot -> what it may be; D is left out where the layer has no bias.
        stream: what the draw depends on: seed, step, number of the micro batch, name of the layer.
    """
    generator = random.Random("/".join(map(str, stream)))
    drawn = []
    for slot in slots_of(choices, has_bias):
        specs = choices[slot]
        modes, own = list(dict.fromkeys(spec.mode for spec in specs)), (odds or {}).get(slot)
        mode = generator.choice(modes) if own is None else generator.choices(modes, [own.get(m, 1.0) for m in modes])[0]
        spec = generator.choice([spec for spec in specs if spec.mode == mode])
        if mode != "none":
            drawn.append((slot, spec))
    return LayerPath(tuple(drawn))


class Supernet:
    """Draws the paths of a model's layers.

    Args:
        layers: by name.
        seed: of the run.
        sandwich: of so many micro batches one trains the largest path, and the next one the smallest (the sandwich
            rule of arXiv 1903.05134, in turns); 0: all are drawn.
        micro_batches: of a step, on all processes.
        odds: of modes.

    Attributes:
        is_largest: the micro batch that was drawn last has the largest path.
    """

    def __init__(
        self,
        layers: Mapping[str, SearchedLayer],
        seed: int,
        sandwich: int = 0,
        micro_batches: int = 1,
        odds: Odds | None = None,
    ):
        self.layers, self.seed, self.odds = layers, seed, odds
        self.sandwich, self.micro_batches = sandwich, micro_batches
        self.is_largest = False

    def draw(self, step: int, number: int) -> None:
        """Give every layer a path for one micro batch.

        Args:
            number: of the micro batch among those of the step on all processes.
        """
        turn = (step * self.micro_batches + number) % self.sandwich if self.sandwich else None
        self.is_largest = turn == 0
        for name, layer in self.layers.items():
            choices, has_bias = layer.choices["default"], layer.b0 is not None
            if turn == 0:
                path = largest_path(choices, has_bias)
            elif turn == 1:
                path = smallest_path(choices, has_bias)
            else:
                path = draw_path(choices, has_bias, self.seed, step, number, name, odds=self.odds)
            layer.path["default"] = path

    def largest(self) -> None:
        """Give every layer the largest path: what is scored while nothing is searched."""
        for layer in self.layers.values():
            layer.path["default"] = largest_path(layer.choices["default"], layer.b0 is not None)

    @contextmanager
    def as_teacher(self) -> Iterator[bool]:
        """Give every layer the largest path inside of the block; tell whether it has it outside too."""
        drawn = {name: layer.path["default"] for name, layer in self.layers.items()}
        self.largest()
        try:
            yield self.is_largest
        finally:
            for name, layer in self.layers.items():
                layer.path["default"] = drawn[name]
