"""What the optimizer knows survives a checkpoint: 8-bit moments bit for bit, the next steps as if nothing happened."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glora_llm.schema import TrainingSection
from glora_llm.training.adam_state import BLOCK, AdamState, _dequantised, _quantise_into
from glora_llm.training.optim import Trainable, make_optimizer, parameter_groups, set_lr

SHAPES = {"down": (300, 17), "up": (16, 512), "long": (4097,), "short": (40,)}  # the last one stays in float32
ROUNDING = 3e-7  # float32: a scale is found again by one product and one division


def gradients(step: int) -> dict[str, Tensor]:
    """Gradients whose blocks differ in sign and size; the extreme of many a block is negative."""
    generator = torch.Generator().manual_seed(step)
    found = {}
    for name, shape in SHAPES.items():
        flat = torch.randn(torch.Size(shape).numel(), generator=generator)
        flat[:1000] -= 1.5  # blocks that lean to one side
        flat[1000:2000] *= 1e-4
        flat[7 + step] = -9.0
        found[name] = flat.reshape(shape)
    return found


def made_optimizer(name: str, items: list[Trainable]) -> Any:
    keys: dict[str, Any] = {"global_batch": 1, "micro_batch": 1, "steps": 1, "lr": 1e-2, "optimizer": name}
    return make_optimizer(TrainingSection(**keys), parameter_groups(items, 0.1), offload=False)


class Training:
    """Some parameters, their optimizer and the state that reads and writes it, as the engine of stage 0 has them."""

    def __init__(self, optimizer: str) -> None:
        generator = torch.Generator().manual_seed(1)
        values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        self.items = [Trainable(name, nn.Parameter(value)) for name, value in values.items()]
        self.optimizer = made_optimizer(optimizer, self.items)
        self.state = AdamState(SimpleNamespace(optimizer=self.optimizer), stage=0)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            for item in self.items:
                item.parameter.grad = gradients(step)[item.name]
            set_lr(self.optimizer, 1e-2)
            self.optimizer.step()

    def moments(self, name: str) -> dict[str, Any]:
        (parameter,) = (item.parameter for item in self.items if item.name == name)
        return self.optimizer.state[parameter]


@pytest.fixture(scope="module")
def eight_bit() -> Training:
    made = Training("adamw_8bit")
    made.steps(0, 5)
    return made


def test_these_states_are_what_the_tests_mean(eight_bit: Training) -> None:
    kinds = {name: eight_bit.moments(name)["state1"].dtype for name in SHAPES}
    assert kinds == {"down": torch.uint8, "up": torch.uint8, "long": torch.uint8, "short": torch.float32}
    first = _dequantised(eight_bit.moments("down"), "1").flatten()[:BLOCK]
    assert -first.min() > 2 * first.max() > 0
    assert any(torch.Size(shape).numel() % BLOCK for shape in SHAPES.values())


@pytest.mark.parametrize("number", ["1", "2"])
@pytest.mark.parametrize("name", SHAPES)
def test_dequantise_and_quantise_give_the_same_codes_and_scales(eight_bit: Training, name: str, number: str) -> None:
    state = eight_bit.moments(name)
    again = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    moment = _dequantised(state, number)
    assert moment.dtype == torch.float32 and moment.shape == SHAPES[name] and moment.abs().max() > 0
    again[f"state{number}"].fill_(3)
    if f"absmax{number}" in again:
        again[f"absmax{number}"].fill_(3)
    _quantise_into(again, number, moment)
    assert torch.equal(again[f"state{number}"], state[f"state{number}"])
    if f"absmax{number}" in state:
        torch.testing.assert_close(again[f"absmax{number}"], state[f"absmax{number}"], rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_value_in_a_block_of_zeros(sign: float) -> None:
    """The rest of its block is (nearly) zero, every other block is zero, and the one value has either sign."""
    parameter = nn.Parameter(torch.zeros(20 * BLOCK + 9))
    optimizer = made_optimizer("adamw_8bit", [Trainable("p", parameter)])
    set_lr(optimizer, 1e-2)
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad[:: 2 * BLOCK] = sign
    optimizer.step()
    state = optimizer.state[parameter]
    for number in ("1", "2"):
        scales, moment = state[f"absmax{number}"].clone(), _dequantised(state, number)
        assert float(moment[0]) == pytest.approx({"1": 0.1 * sign, "2": 1e-3}[number], rel=0.01)
        assert int((scales == 0).sum()) == 10 and not moment[BLOCK : 2 * BLOCK].any()
        _quantise_into(state, number, moment)
        torch.testing.assert_close(_dequantised(state, number), moment, rtol=ROUNDING, atol=0)
        torch.testing.assert_close(state[f"absmax{number}"], scales, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_steps_after_a_restore_are_the_uninterrupted_ones(optimizer: str) -> None:
    whole = Training(optimizer)
    whole.steps(0, 4)
    saved = dict(whole.state.gather(whole.items))
    assert saved.keys() == {f"{kind}/{name}" for kind in ("master", "exp_avg", "exp_avg_sq") for name in SHAPES}
    assert all(value.dtype == torch.float32 and value.shape == SHAPES[key.partition("/")[2]]
               for key, value in saved.items())  # fmt: skip
    whole.steps(4, 7)

    resumed = Training(optimizer)
    resumed.state.restore(resumed.items, saved, step=4)
    again = dict(resumed.state.gather(resumed.items))
    for key, value in saved.items():
        torch.testing.assert_close(again[key], value, rtol=ROUNDING, atol=0, msg=key)
    resumed.steps(4, 7)
    for mine, theirs in zip(resumed.items, whole.items, strict=True):
        exact = optimizer == "adamw"
        torch.testing.assert_close(mine.parameter, theirs.parameter, rtol=0, atol=0 if exact else 1e-6, msg=mine.name)


def test_reading_leaves_the_optimizer_as_it_was(eight_bit: Training) -> None:
    before = {name: set(eight_bit.moments(name)) for name in SHAPES}
    assert len(dict(eight_bit.state.gather(eight_bit.items))) == 3 * len(SHAPES)
    assert {name: set(eight_bit.moments(name)) for name in SHAPES} == before
    assert not any({"exp_avg", "exp_avg_sq"} & keys for keys in before.values())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_new_state_is_zero_and_does_not_change_the_first_step(optimizer: str) -> None:
    made = Training(optimizer)
    fresh = dict(made.state.gather(made.items))
    assert all(not fresh[f"{kind}/{name}"].any() for kind in ("exp_avg", "exp_avg_sq") for name in SHAPES)
    start = {item.name: item.parameter.detach().clone() for item in made.items}
    made.steps(0, 1)
    for item in made.items:  # Adam's first step is lr g / (|g| + eps), beside the decay of matrices
        decay, g = 0.1 if item.parameter.ndim > 1 else 0.0, gradients(0)[item.name]
        expected = start[item.name] * (1 - 1e-2 * decay) - 1e-2 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(item.parameter.detach(), expected, rtol=0, atol=1e-6)
