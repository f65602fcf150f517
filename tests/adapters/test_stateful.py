"""The contract of an adapter method with a state of its own: it penalises, steps, and goes on from what it saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from glora_llm.adapters.inject import inject
from glora_llm.adapters.stateful import (
    STATEFUL_METHODS,
    StatefulMethod,
    load_state,
    needs_whole_gradients,
    save_state,
    stateful_method,
)
from glora_llm.schema import AdapterSection
from tests.adapters.test_inject import llama

STEPS = 20


def section(method: str) -> AdapterSection:
    return AdapterSection(method=method, targets=["q_proj", "v_proj"], rank=4)


def made(name: str) -> tuple[Any, StatefulMethod]:
    model = inject(llama(), section(name), seed=0, steps=STEPS)
    method = stateful_method(model, section(name))
    assert method is not None
    return model, method


def train(model: Any, method: StatefulMethod, steps: range) -> None:
    """Take some steps of plain gradient descent as the engine does."""
    for step in steps:
        torch.manual_seed(step)
        tokens = torch.randint(0, 32, (2, 8))
        (model(input_ids=tokens, labels=tokens).loss + method.penalty()).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.1 * parameter.grad)
        method.step()
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", STATEFUL_METHODS)
def test_it_goes_on_from_what_it_saved(name: str, tmp_path: Path) -> None:
    model, method = made(name)
    train(model, method, range(5))
    save_state(method, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.safetensors", f"{name}.json"}
    other, resumed = made(name)
    other.load_state_dict(model.state_dict())
    load_state(resumed, tmp_path)
    train(model, method, range(5, 12))
    train(other, resumed, range(5, 12))
    expected, found = model.state_dict(), other.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    (tensors, values), (other_tensors, other_values) = method.state_dict(), resumed.state_dict()
    assert values == other_values and tensors.keys() == other_tensors.keys() and tensors
    assert all(torch.equal(tensors[key], other_tensors[key]) for key in tensors)


def test_adalora_s_files_are_those_of_earlier_versions(tmp_path: Path) -> None:
    model, method = made("adalora")
    train(model, method, range(4))
    save_state(method, tmp_path)
    assert json.loads((tmp_path / "adalora.json").read_text()).keys() == {"step", "rank_pattern"}
    kinds = {name.split("/")[0] for name in method.state_dict()[0]}
    assert kinds == {"ipt", "exp_avg_ipt", "exp_avg_unc"}


def test_a_skipped_step_counts_and_changes_nothing() -> None:
    model, method = made("adalora")
    train(model, method, range(4))
    before = {name: tensor.clone() for name, tensor in method.state_dict()[0].items()}
    method.step()  # without gradients
    tensors, values = method.state_dict()
    assert values["step"] == 5
    assert all(torch.equal(before[name], tensors[name]) for name in before)


def test_other_methods_have_none() -> None:
    lora = section("lora")
    assert stateful_method(inject(llama(), lora, seed=0, steps=STEPS), lora) is None
    assert not needs_whole_gradients(lora) and needs_whole_gradients(section("adalora"))
