"""Whole master weights and gradients by name on every process, right after an optimizer step, under any ZeRO stage.

For adapter methods that look at what training did: AdaLoRA ranks factors by their gradients, PeriodicLoRA takes the
factors away. Each call is a collective: all processes make the same ones.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from glora_llm.training.adam_state import MASTER, MOMENTS, AdamState, Partition
from glora_llm.training.optim import Trainable
from glora_llm.training.sharding import set_everywhere


class WholeState:
    """The trained parameters of one engine.

    Args:
        adam: the masters, moments and partitions of the engine.
        trainables: the trained parameters, in the same order on all processes.
    """

    def __init__(self, adam: AdamState, trainables: Sequence[Trainable]):
        self.adam = adam
        self.names = {id(item.parameter): item.name for item in trainables}
        self.parameters = {item.name: item.parameter for item in trainables}
        self.gradient_parts: dict[int, Tensor] = {}

    def keep_gradients(self) -> None:
        """From now on, keep the gradients of each step for `gradients`."""
        self.adam.optimizer.register_step_post_hook(lambda *_: self._note_gradients())

    def _note_gradients(self) -> None:
        """Keep what the optimizer stepped by; DeepSpeed steps group after group, and lets go of each group's at once.

        It clips in place, so what is kept is what was stepped by, in float32 and without float16's loss scale.
        """
        for number, part in enumerate(self.adam.partitions):
            if part.flat.grad is not None:
                self.gradient_parts[number] = part.flat.grad

    def forget_gradients(self) -> None:
        """Let go of the gradients of the last step; called when nobody reads them any more."""
        self.gradient_parts.clear()

    def gradients(self) -> dict[str, Tensor]:
        """Return the clipped gradient of the whole batch by parameter name, float32, as the last step used it."""
        found: dict[str, Tensor] = {}
        for number, part in enumerate(self.adam.partitions):
            if number in self.gradient_parts:
                found |= self._gathered(part, self.gradient_parts[number].detach().flatten().float())
        return found

    def masters(self) -> dict[str, Tensor]:
        """Return copies of the float32 master weights by parameter name."""
        found: dict[str, Tensor] = {}
        for part in self.adam.partitions:
            found |= self._gathered(part, self.adam.read(part, MASTER))
        return found

    def _gathered(self, part: Partition, mine: Tensor) -> dict[str, Tensor]:
        return {self.names[id(p)]: value for p, value in self.adam.whole(part, mine, self.adam.device)}

    @torch.no_grad()
    def set_masters(self, values: Mapping[str, Tensor]) -> None:
        """Set parameters, their float32 masters and the model's own copies, to whole values, alike on all processes."""
        for part in self.adam.partitions:
            for piece in part.pieces:
                name = self.names[id(piece.parameter)]
                if name in values and piece.process == part.process:
                    value = values[name].flatten()[piece.start :][: piece.length]
                    part.flat.view(-1)[piece.at :][: piece.length].copy_(value)
        for name, value in values.items():
            set_everywhere(self.parameters[name], value)

    @torch.no_grad()
    def forget_moments(self, names: Iterable[str]) -> None:
        """Set Adam's moments of some parameters to zero, as at the start; its count is `set_count`'s."""
        wanted = set(names)
        for part in self.adam.partitions:
            for key in MOMENTS:
                moment = self.adam.read(part, key).clone()
                for piece in part.pieces:
                    if piece.process == part.process and self.names[id(piece.parameter)] in wanted:
                        moment[piece.at :][: piece.length] = 0
                self.adam.write(part, key, moment.reshape(part.flat.shape))

    def set_count(self, names: Iterable[str], steps: int) -> None:
        """Set the number of steps that Adam corrects its moments by, of the partitions of some parameters."""
        wanted = set(names)
        for part in self.adam.partitions:
            if any(self.names[id(piece.parameter)] in wanted for piece in part.pieces):
                self.adam.set_count(part, steps)
