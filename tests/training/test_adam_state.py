"""An optimizer's state survives a checkpoint: 8-bit moments bit for bit, the next steps as if nothing happened."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import bitsandbytes  # before a test says that there is a GPU
import pytest
import torch
from torch import Tensor, nn

from glora_llm.schema import TrainingSection
from glora_llm.training import adam_state
from glora_llm.training.adam_state import BLOCK, AdamState, _dequantised, _quantise_into
from glora_llm.training.optim import Trainable, make_optimizer, parameter_groups, set_lr

# "short" stays in float32; "paged" is large enough for the paged optimizers to page it (from 100,000 elements on).
SHAPES = {"down": (300, 17), "up": (16, 512), "long": (4097,), "short": (40,), "paged": (310, 400)}
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
CPU = torch.device("cpu")
ROUNDING = 3e-7  # float32: a scale is found again by one product and one division


def gradients(step: int, device: torch.device = CPU) -> dict[str, Tensor]:
    """Gradients whose blocks differ in sign and size; the extreme of many a block is negative."""
    generator = torch.Generator().manual_seed(step)
    found = {}
    for name, shape in SHAPES.items():
        flat = torch.randn(torch.Size(shape).numel(), generator=generator)
        flat[:1000] -= 1.5  # blocks that lean to one side
        flat[1000:2000] *= 1e-4
        flat[7 + step] = -9.0
        found[name] = flat.reshape(shape).to(device)
    return found


def made_optimizer(name: str, items: list[Trainable]) -> Any:
    """Make an optimizer; a paged one too where there is no GPU, on which its states are ordinary CPU tensors."""
    keys: dict[str, Any] = {"global_batch": 1, "micro_batch": 1, "steps": 1, "lr": 1e-2, "optimizer": name}
    with pytest.MonkeyPatch.context() as patch:
        assert bitsandbytes.optim
        patch.setattr(torch.cuda, "is_available", lambda: True)
        return make_optimizer(TrainingSection(**keys), parameter_groups(items, 0.1), offload=False)


class Training:
    """Some parameters, their optimizer and the state that reads and writes it, as the engine of stage 0 has them."""

    def __init__(self, optimizer: str, device: torch.device = CPU) -> None:
        generator = torch.Generator().manual_seed(1)
        self.device = device
        values = {name: torch.randn(shape, generator=generator).to(device) for name, shape in SHAPES.items()}
        self.items = [Trainable(name, nn.Parameter(value)) for name, value in values.items()]
        self.optimizer = made_optimizer(optimizer, self.items)
        self.state = AdamState(SimpleNamespace(optimizer=self.optimizer), 0, device)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            for item in self.items:
                item.parameter.grad = gradients(step, self.device)[item.name]
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
    assert kinds == dict.fromkeys(SHAPES, torch.uint8) | {"short": torch.float32}
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


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_after_a_restore_are_the_uninterrupted_ones(optimizer: str, device: torch.device) -> None:
    whole = Training(optimizer, device)
    whole.steps(0, 4)
    saved = dict(whole.state.gather(whole.items))
    assert saved.keys() == {f"{kind}/{name}" for kind in ("master", "exp_avg", "exp_avg_sq") for name in SHAPES}
    assert all(value.dtype == torch.float32 and value.shape == SHAPES[key.partition("/")[2]]
               for key, value in saved.items())  # fmt: skip
    assert all(value.device == CPU for value in saved.values())
    whole.steps(4, 7)

    resumed = Training(optimizer, device)
    resumed.state.restore(resumed.items, saved, step=4)
    again = dict(resumed.state.gather(resumed.items))
    for key, value in saved.items():
        torch.testing.assert_close(again[key], value, rtol=ROUNDING, atol=0, msg=key)
    resumed.steps(4, 7)
    for mine, theirs in zip(resumed.items, whole.items, strict=True):
        exact = optimizer in ("adamw", "paged_adamw")
        torch.testing.assert_close(mine.parameter, theirs.parameter, rtol=0, atol=0 if exact else 1e-6, msg=mine.name)


def test_reading_leaves_the_optimizer_as_it_was(eight_bit: Training) -> None:
    before = {name: set(eight_bit.moments(name)) for name in SHAPES}
    assert len(dict(eight_bit.state.gather(eight_bit.items))) == 3 * len(SHAPES)
    assert {name: set(eight_bit.moments(name)) for name in SHAPES} == before
    assert not any({"exp_avg", "exp_avg_sq"} & keys for keys in before.values())


def test_a_paged_moment_is_computed_where_its_scales_are(eight_bit: Training) -> None:
    """bitsandbytes pages to CPU tensors and keeps scales and codes on the GPU, whose kernels cannot read the former."""
    state = {key: value.to("meta") if "state" not in key else value for key, value in moments_of(eight_bit).items()}
    assert state["state1"].device == CPU
    moment = _dequantised(state, "1")
    assert moment.device.type == "meta" and moment.shape == SHAPES["paged"]
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # on the way back to the CPU alone
        _quantise_into(state, "1", torch.zeros(SHAPES["paged"]))


def moments_of(training: Training) -> dict[str, Tensor]:
    return {key: value for key, value in training.moments("paged").items() if isinstance(value, Tensor)}


@pytest.mark.parametrize(
    ("flag", "place"),
    [({"fused": True}, "meta"), ({"capturable": True}, "meta"), ({}, "cpu"), ({"fused": None}, "cpu")],
)
def test_a_step_counter_lies_where_the_optimizer_reads_it(flag: dict[str, Any], place: str) -> None:
    """torch's fused and capturable kernels want it beside the parameters, at the start and after a resume."""
    item = Trainable("p", nn.Parameter(torch.zeros(3, 2)))
    optimizer = torch.optim.AdamW([item.parameter])
    optimizer.param_groups[0].update(flag)
    flat = nn.Parameter(torch.zeros(6, device="meta"))
    optimizer.param_groups[0]["params"] = [flat]
    state = AdamState(SimpleNamespace(optimizer=optimizer), 0, CPU)
    step = optimizer.state[flat]["step"]
    assert (step.device.type, step.dtype, step.shape) == (place, torch.float32, ())
    state.partitions = [replace(state.partitions[0], pieces=[])]
    state.restore([item], {}, step=5)
    step = optimizer.state[flat]["step"]
    assert (step.device.type, step.dtype) == (place, torch.float32)


def test_deepspeed_s_cpu_adam_counts_in_plain_numbers() -> None:
    parameter = nn.Parameter(torch.zeros(3, 2))
    keys: dict[str, Any] = {"global_batch": 1, "micro_batch": 1, "steps": 1, "lr": 1e-2}
    optimizer = make_optimizer(
        TrainingSection(**keys), parameter_groups([Trainable("p", parameter)], 0.0), offload=True
    )
    state = AdamState(SimpleNamespace(optimizer=optimizer), 0, CPU)
    assert optimizer.state[parameter]["step"] == 0
    zeros = dict(state.gather([Trainable("p", parameter)]))
    state.restore([Trainable("p", parameter)], zeros, step=5)
    assert optimizer.state[parameter]["step"] == 5
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[parameter]["step"] == 6


@pytest.mark.parametrize("length", [1, 3, 7, 64])
def test_a_checkpoint_is_the_same_however_it_is_cut(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Training("adamw")
    made.steps(0, 2)
    whole = dict(made.state.gather(made.items))
    monkeypatch.setattr(adam_state, "BUCKET", length * 1000 + 1)
    again = dict(made.state.gather(made.items))
    assert whole.keys() == again.keys() and all(torch.equal(again[key], value) for key, value in whole.items())


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
