"""The contract of an adapter method with a state of its own: it penalises, steps, and goes on from what it saved."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glora_llm.adapters.inject import inject
from glora_llm.adapters.stateful import STATEFUL_METHODS, StatefulMethod, load_state, save_state, stateful_method
from glora_llm.adapters.weights import save_adapter, trainables
from glora_llm.schema import AdapterSection
from glora_llm.training.adam_state import AdamState
from glora_llm.training.optim import parameter_groups, set_lr
from glora_llm.training.penalty import Penalty
from glora_llm.training.whole_state import WholeState
from tests.adapters.test_inject import llama

STEPS = 20


def section(method: str) -> AdapterSection:
    return AdapterSection(method=method, targets=["q_proj", "v_proj"], rank=4)


class Training:
    """An adapter of a method, trained as the engine does, on one process without DeepSpeed."""

    def __init__(self, name: str, **peft: Any) -> None:
        given = section(name).model_copy(update={"peft": peft or None})
        self.model: Any = inject(llama(), given, seed=0, steps=STEPS)
        method = stateful_method(self.model, given)
        assert method is not None
        self.method: StatefulMethod = method
        self.items = trainables(self.model, section(name), loraplus_ratio=1.0)
        optimizer = torch.optim.AdamW(parameter_groups(self.items, 0.0))
        set_lr(optimizer, 0.01)
        self.adam = AdamState(SimpleNamespace(optimizer=optimizer), 0, torch.device("cpu"))
        method.attach(WholeState(self.adam, self.items))
        self.penalty = Penalty(method.penalty_gradients())
        self.penalty.is_due = True

    def train(self, steps: range, skipped: tuple[int, ...] = ()) -> None:
        for step in steps:
            torch.manual_seed(step)
            tokens = torch.randint(0, 32, (2, 8))
            self.model(input_ids=tokens, labels=tokens).loss.backward()
            if step not in skipped:
                self.adam.optimizer.step()
            self.model.zero_grad(set_to_none=True)
            self.method.step(step in skipped)


@pytest.mark.parametrize("name", STATEFUL_METHODS)
def test_it_goes_on_from_what_it_saved(name: str, tmp_path: Path) -> None:
    whole, resumed = Training(name), Training(name)
    whole.train(range(5))
    saved = dict(whole.adam.gather(whole.items))
    save_adapter(whole.model, saved, tmp_path, "base")
    save_state(whole.method, tmp_path)
    assert {f"{name}.safetensors", f"{name}.json"} <= {path.name for path in tmp_path.iterdir()}
    resumed.adam.restore(resumed.items, saved, 5)
    load_state(resumed.method, tmp_path)
    whole.train(range(5, 12))
    resumed.train(range(5, 12))
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    (tensors, values), (other_tensors, other_values) = whole.method.state_dict(), resumed.method.state_dict()
    assert values == other_values and tensors.keys() == other_tensors.keys() and values["step"] == 12
    assert all(torch.equal(tensors[key], other_tensors[key]) for key in tensors)


def test_adalora_s_files_are_those_of_earlier_versions(tmp_path: Path) -> None:
    one = Training("adalora")
    one.train(range(4))
    save_state(one.method, tmp_path)
    assert json.loads((tmp_path / "adalora.json").read_text()).keys() == {"step", "rank_pattern"}
    kinds = {name.split("/")[0] for name in one.method.state_dict()[0]}
    assert kinds == {"ipt", "exp_avg_ipt", "exp_avg_unc"}


def test_adalora_s_penalty_is_peft_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients that are added to those of the loss are those of PEFT's loss, which has the penalty in it."""
    one, tokens = Training("adalora"), torch.arange(16).reshape(2, 8)
    one.model(input_ids=tokens, labels=tokens).loss.backward()  # PEFT's, and ours is added
    twice = {item.name: item.parameter.grad for item in one.items}
    one.model.zero_grad(set_to_none=True)
    one.penalty.is_due = False
    one.model(input_ids=tokens, labels=tokens).loss.backward()
    once = {item.name: item.parameter.grad for item in one.items}
    one.model.zero_grad(set_to_none=True)
    monkeypatch.setattr(one.method.config, "orth_reg_weight", 0.0)  # type: ignore[attr-defined]
    one.model(input_ids=tokens, labels=tokens).loss.backward()
    for item in one.items:
        without, of_peft, ours = item.parameter.grad, once[item.name], twice[item.name]
        assert without is not None and of_peft is not None and ours is not None
        torch.testing.assert_close(ours - of_peft, of_peft - without, rtol=1e-3, atol=1e-7)
        assert "lora_E" in item.name or (of_peft - without).abs().max() > 1e-6


def test_adalora_is_peft_s_update_and_allocate() -> None:
    """Importance and pruning are those of PEFT's own call, with the gradients in the parameters."""
    ours, peft = Training("adalora"), Training("adalora")
    ours.train(range(STEPS))
    for step in range(STEPS):
        torch.manual_seed(step)
        tokens = torch.randint(0, 32, (2, 8))
        peft.model(input_ids=tokens, labels=tokens).loss.backward()
        peft.adam.optimizer.step()
        peft.model.base_model.update_and_allocate(step + 1)
        peft.model.zero_grad(set_to_none=True)
    expected, found = peft.model.state_dict(), ours.model.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    pattern = ours.method.state_dict()[1]["rank_pattern"]
    assert pattern == peft.method.state_dict()[1]["rank_pattern"]
    assert {kept for flags in pattern.values() for kept in flags} == {True, False}, "nothing was pruned"


def test_a_skipped_step_counts_and_changes_nothing() -> None:
    one = Training("adalora")
    one.train(range(4))
    before = {name: tensor.clone() for name, tensor in one.method.state_dict()[0].items()}
    one.train(range(4, 5), skipped=(4,))
    tensors, values = one.method.state_dict()
    assert values["step"] == 5
    assert all(torch.equal(before[name], tensors[name]) for name in before)


def test_ranks_are_fixed_by_the_next_step_where_the_one_that_fixes_them_is_skipped() -> None:
    one, last = Training("adalora"), STEPS - STEPS // 5
    one.train(range(last), skipped=(last - 1,))
    assert one.method.state_dict()[0], "importance is forgotten when the ranks are fixed"
    one.train(range(last, STEPS))
    tensors, values = one.method.state_dict()
    assert not tensors and sum(map(sum, values["rank_pattern"].values())) == 4 * len(values["rank_pattern"])


def test_other_methods_have_none() -> None:
    lora = section("lora")
    assert stateful_method(inject(llama(), lora, seed=0, steps=STEPS), lora) is None
