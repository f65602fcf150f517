"""Muon on the partitions that this process holds is torch's Muon, beside torch's AdamW; its state is kept."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from glora_llm.schema import TrainingSection
from glora_llm.training.adam_state import AdamState, Partition, Piece
from glora_llm.training.muon import MuonAdamW, matrices
from glora_llm.training.optim import Trainable, make_optimizer, parameter_groups, set_lr

SHAPES = {"wide": (12, 40), "tall": (48, 6), "square": (16, 16), "head": (20, 8), "norm": (16,)}
MUON = ("wide", "tall", "square")
LR, DECAY = 0.02, 0.3


def values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


class Training:
    """Parameters under our optimizer, as the engine of ZeRO 0 has them."""

    def __init__(self) -> None:
        self.items = [Trainable(name, nn.Parameter(v), muon=name in MUON) for name, v in values(0).items()]
        keys: dict[str, Any] = {"global_batch": 1, "micro_batch": 1, "steps": 1, "lr": LR, "optimizer": "muon"}
        self.optimizer: Any = make_optimizer(
            TrainingSection(**keys), parameter_groups(self.items, DECAY), offload=False
        )
        assert isinstance(self.optimizer, MuonAdamW)
        self.state = AdamState(SimpleNamespace(optimizer=self.optimizer), 0, torch.device("cpu"))
        self.optimizer.bind(self.state.partitions)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            for item in self.items:
                item.parameter.grad = values(100 + step)[item.name]
            set_lr(self.optimizer, LR)
            self.optimizer.step()

    def parameters(self) -> dict[str, Tensor]:
        return {item.name: item.parameter.detach() for item in self.items}


def test_a_step_is_torchs_muon_and_torchs_adamw() -> None:
    ours, expected = Training(), {name: nn.Parameter(value) for name, value in values(0).items()}
    muon = torch.optim.Muon(
        [expected[name] for name in MUON], lr=LR, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW([{"params": [expected["head"]], "weight_decay": DECAY}], lr=LR)
    adam.add_param_group({"params": [expected["norm"]], "weight_decay": 0.0})
    ours.steps(0, 4)
    for step in range(4):
        for name, parameter in expected.items():
            parameter.grad = values(100 + step)[name]
        muon.step()
        adam.step()
    for name, value in ours.parameters().items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-6, atol=1e-7, msg=name)
        assert (value - values(0)[name]).abs().max() > LR / 2


def test_the_state_holds_one_moment_of_a_matrix_and_goes_on_bit_for_bit() -> None:
    whole, first, second = Training(), Training(), Training()
    whole.steps(0, 5)
    first.steps(0, 3)
    state = dict(first.state.gather(first.items))
    assert {key for key in state if key.endswith("/wide")} == {"master/wide", "momentum_buffer/wide"}
    assert {key for key in state if key.endswith("/norm")} == {"master/norm", "exp_avg/norm", "exp_avg_sq/norm"}
    second.state.restore(second.items, {key: value.clone() for key, value in state.items()}, step=3)
    second.steps(3, 5)
    for name, parameter in whole.parameters().items():
        assert torch.equal(second.parameters()[name], parameter), name


def test_a_partition_names_its_matrices_in_the_order_of_their_pieces() -> None:
    a, b = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4, 2))
    pieces = [Piece(a, 0, 0, 0, 6), Piece(b, 0, 6, 0, 1), Piece(b, 1, 0, 1, 7)]
    found = matrices(Partition(torch.zeros(7), 0, pieces))
    assert [(matrix is a, [piece.process for piece in part]) for matrix, part in found] == [
        (True, [0]),
        (False, [0, 1]),
    ]
