"""Muon for matrices beside AdamW for the rest, on the partitions of any ZeRO stage.

Muon (torch.optim.Muon; arXiv 2502.16982) replaces the momentum of a matrix by the nearest matrix with equal singular
values, by five Newton-Schulz steps: that needs the whole matrix, and ZeRO gives an optimizer flat parts of it. The
momentum, its look-ahead and weight decay are the same element by element, so they stay divided; only what is
orthogonalised is made whole, one matrix at a time. Under ZeRO 3 each process has a part of every matrix, so each
orthogonalises all of them.

DeepSpeed's own Muon (0.19) is not used: it writes the orthogonal update into the gradient before its norm is taken and
clipped, refuses reduce_scatter and groups of unlike momentum, and has kernels and states of its own in each stage. Here
clipping, checkpoints and stages are those of AdamW.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from glora_llm.training.adam_state import MUON_MOMENTS, Partition, Piece

(MOMENTUM_BUFFER,) = MUON_MOMENTS


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups with `muon` set are stepped by Muon with Nesterov's look-ahead.

    The step of a matrix is torch.optim.Muon's with adjust_lr_fn="match_rms_adamw": its entries are 0.2 of the learning
    rate in the root mean square, as AdamW's usually are, so one learning rate and weight decay serve both.

    Args:
        groups: each with `muon`, true for matrices alone.
        momentum: of Muon.
        options: of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float, **options: Any):
        super().__init__(groups, **options)
        self.momentum = momentum
        self._partitions: dict[int, Partition] = {}

    def bind(self, partitions: Sequence[Partition]) -> None:
        """Tell which matrices lie where in the tensors that are stepped."""
        self._partitions = {id(part.flat): part for part in partitions}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step every group; under ZeRO all processes call it together, group by group."""
        every = self.param_groups
        self.param_groups = [group for group in every if not group["muon"]]
        if any(group["params"] for group in self.param_groups):
            super().step(closure)
        self.param_groups = every
        for group in every:
            for flat in group["params"] if group["muon"] else ():
                if flat.grad is not None:
                    self._step_matrices(group, flat)

    def _step_matrices(self, group: dict[str, Any], flat: Tensor) -> None:
        part, buffer = self._partitions[id(flat)], self.state[flat][MOMENTUM_BUFFER]
        gradient = flat.grad.to(buffer.dtype)  # type: ignore[union-attr]
        buffer.lerp_(gradient, 1 - self.momentum)
        ahead = gradient.lerp(buffer, self.momentum).view(-1)
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        mine = flat.view(-1)
        for parameter, pieces in matrices(part):
            whole = _whole(parameter, pieces, ahead, part)
            if whole is not None:
                change = _muon_step(whole, group["lr"]).view(-1)
                for piece in pieces:
                    if piece.process == part.process:
                        mine[piece.at :][: piece.length] += change[piece.start :][: piece.length]


def matrices(part: Partition) -> list[tuple[nn.Parameter, list[Piece]]]:
    """Return the matrices of a partition with their pieces on all processes, in the same order everywhere."""
    found: dict[nn.Parameter, list[Piece]] = {}
    for piece in part.pieces:
        found.setdefault(piece.parameter, []).append(piece)
    return list(found.items())


def _whole(parameter: nn.Parameter, pieces: Sequence[Piece], values: Tensor, part: Partition) -> Tensor | None:
    """Return a matrix, (O, I), of the values that its pieces have on all processes; None: this one holds none of it.

    A matrix that one process holds is not sent. Of another each process adds its pieces to zeros, which is exact.
    """
    shape = getattr(parameter, "ds_shape", parameter.shape)
    if len({piece.process for piece in pieces}) == 1:
        (piece,) = pieces
        return values[piece.at :][: piece.length].view(shape) if piece.process == part.process else None
    whole = values.new_zeros(shape)
    flat, holds = whole.view(-1), False
    for piece in pieces:
        if piece.process == part.process:
            flat[piece.start :][: piece.length] = values[piece.at :][: piece.length]
            holds = True
    dist.all_reduce(whole, group=part.process_group)
    return whole if holds else None


def _muon_step(momentum: Tensor, lr: float) -> Tensor:
    """Return the change that torch's Muon makes to a matrix without decay, (O, I), of a momentum that looks ahead."""
    change = nn.Parameter(torch.zeros_like(momentum))
    change.grad = momentum
    options: dict[str, Any] = {"momentum": 0.0, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}
    torch.optim.Muon([change], lr=lr, weight_decay=0.0, **options).step()
    return change.data
