"""The learning rate is a function of the step alone; matrices decay and nothing else does; misfits are named."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glora_llm.errors import UserError
from glora_llm.schema import TrainingSection
from glora_llm.training.optim import Trainable, lr_at, make_optimizer, parameter_groups, set_lr


def settings(**keys: Any) -> TrainingSection:
    return TrainingSection(**{"global_batch": 4, "micro_batch": 2, "steps": 10, "lr": 2.0, "warmup": 2, **keys})


def trainable(name: str, values: Tensor, factor: float = 1.0) -> Trainable:
    return Trainable(name, nn.Parameter(values), factor)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # of 2.0, by hand: halves of the warm-up, then what is left at progress 0, 1/8 .. 7/8
        ("constant", [1.0] + 9 * [2.0]),
        ("linear", [1.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1.0, 2.0, 2.0, 1.9238795, 1.7071068, 1.3826834, 1.0, 0.6173166, 0.2928932, 0.0761205]),
    ],
)
def test_every_step_of_a_schedule(schedule: str, expected: list[float]) -> None:
    chosen = settings(schedule=schedule)
    got = [lr_at(step, 10, chosen) for step in range(10)]
    assert got == pytest.approx(expected, abs=1e-6)
    assert [lr_at(step, 10, chosen) for step in reversed(range(10))] == got[::-1]  # no state: any order, any start


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_it_ends_at_zero_after_the_last_step(schedule: str) -> None:
    for total in (3, 10, 1000):
        assert lr_at(total, total, settings(schedule=schedule, warmup=0)) == pytest.approx(0.0, abs=1e-15)
        assert lr_at(total - 1, total, settings(schedule=schedule, warmup=0)) > 0


@pytest.mark.parametrize(("warmup", "steps"), [(0.3, 3), (3, 3), (0.04, 0), (0.06, 1), (1, 1), (0.0, 0)])
def test_warmup_is_a_share_below_one_and_steps_above(warmup: float, steps: int) -> None:
    chosen = settings(warmup=warmup, schedule="constant")
    assert [lr_at(step, 10, chosen) for step in range(10)] == pytest.approx(
        [2.0 * (step + 1) / steps for step in range(steps)] + [2.0] * (10 - steps)
    )
    assert lr_at(0, 10, chosen) > 0


def test_a_warmup_longer_than_the_run_stays_below_the_peak() -> None:
    assert [lr_at(step, 3, settings(warmup=4)) for step in range(3)] == [0.5, 1.0, 1.5]


def test_groups_by_factor_and_shape_in_the_order_of_the_parameters() -> None:
    partitioned = trainable("zero3", torch.empty(0), 0.5)
    partitioned.parameter.ds_shape = torch.Size((3, 4))  # type: ignore[attr-defined]
    items = [
        trainable("down", torch.zeros(3, 2), 0.5),
        trainable("shift", torch.zeros(3)),
        trainable("up", torch.zeros(2, 4), 0.5),
        trainable("scalar", torch.zeros(1), 0.5),
        trainable("head", torch.zeros(5, 3)),
        partitioned,
    ]
    groups = parameter_groups(items, weight_decay=0.1)
    assert [(group["names"], group["lr_factor"], group["weight_decay"]) for group in groups] == [
        (["down", "up", "zero3"], 0.5, 0.1),
        (["shift"], 1.0, 0.0),
        (["scalar"], 0.5, 0.0),
        (["head"], 1.0, 0.1),
    ]
    owner = {item.name: item.parameter for item in items}
    for group in groups:
        assert all(p is owner[name] for p, name in zip(group["params"], group["names"], strict=True))


def test_without_decay_matrices_and_vectors_share_a_group() -> None:
    items = [trainable("matrix", torch.zeros(3, 2)), trainable("vector", torch.zeros(3))]
    assert [group["names"] for group in parameter_groups(items, 0.0)] == [["matrix", "vector"]]


def test_one_step_of_adamw_by_hand() -> None:
    """Adam's first step of any gradient g is -lr sign(g); decay takes lr x decay off a matrix, nothing off a vector."""
    items = [trainable("matrix", torch.full((2, 2), 4.0), 0.5), trainable("vector", torch.full((2,), 4.0), 2.0)]
    chosen = settings(weight_decay=0.25)
    optimizer = make_optimizer(chosen, parameter_groups(items, chosen.weight_decay), offload=False)
    assert type(optimizer) is torch.optim.AdamW
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    set_lr(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.2]
    for item in items:
        item.parameter.grad = torch.full_like(item.parameter, -3.0)
    optimizer.step()
    matrix, vector = (item.parameter.detach() for item in items)
    torch.testing.assert_close(matrix, torch.full((2, 2), 4.0 * (1 - 0.05 * 0.25) + 0.05))
    torch.testing.assert_close(vector, torch.full((2,), 4.0 + 0.2))


def test_the_recipe_s_constants_reach_every_optimizer() -> None:
    for name, kind in (("adamw", "AdamW"), ("adamw_8bit", "AdamW8bit")):
        chosen = settings(optimizer=name, betas=(0.8, 0.95), eps=1e-6)
        groups = parameter_groups([trainable("p", torch.zeros(2, 2))], 0.0)
        optimizer = make_optimizer(chosen, groups, offload=False)
        assert type(optimizer).__name__ == kind
        (group,) = optimizer.param_groups
        assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.95), 1e-6)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_bitsandbytes_with_offload_is_an_error(name: str) -> None:
    groups = parameter_groups([trainable("p", torch.zeros(2, 2))], 0.0)
    with pytest.raises(UserError, match=rf"training.optimizer {name} keeps its states on the GPU.*use adamw"):
        make_optimizer(settings(optimizer=name), groups, offload=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to page from")
@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_a_paged_optimizer_needs_a_gpu(name: str) -> None:
    groups = parameter_groups([trainable("p", torch.zeros(2, 2))], 0.0)
    with pytest.raises(UserError, match=rf"training.optimizer {name} .*there is no GPU here"):
        make_optimizer(settings(optimizer=name), groups, offload=False)


def test_the_cosine_is_the_textbook_s() -> None:
    chosen = settings(warmup=0, lr=3e-4)
    for step in range(1000):
        assert lr_at(step, 1000, chosen) == pytest.approx(3e-4 * math.cos(math.pi * step / 2000) ** 2, rel=1e-9)
