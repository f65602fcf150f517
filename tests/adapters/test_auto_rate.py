"""One learning rate for a width: the numbers follow alpha and rank, and what has no such rate is refused."""

from typing import Any

import pytest

from glora_llm.adapters.auto_rate import BASE_RATE, BASE_WIDTH, auto_rate, check_rate, width_of
from glora_llm.errors import UserError
from glora_llm.schema import AdapterSection


def rate(width: int = BASE_WIDTH, **adapter: Any) -> float:
    return auto_rate(AdapterSection(**adapter), width, "a model").lr


def test_one_number_for_all_methods_and_ranks_at_the_reference_alpha() -> None:
    for method in ("glora", "lora", "dora", "lora_dropout", "periodic_lora"):
        for rank in (1, 8, 64):
            assert rate(method=method, rank=rank, alpha=16) == BASE_RATE


def test_it_follows_the_scale_that_a_method_gives_its_update() -> None:
    assert rate(method="lora", rank=8, alpha=32) == BASE_RATE / 2
    assert rate(method="lora", rank=1, alpha=2) == 8 * BASE_RATE  # alpha / r constant: as 1 / r
    assert rate(method="rslora", rank=16, alpha=16) == pytest.approx(BASE_RATE / 4)
    assert rate(method="glora", rank=16, alpha=16, rank_stabilized=True) == pytest.approx(BASE_RATE / 4)
    assert rate(method="glora", rank=4, alpha=16, scaling="even") == BASE_RATE


def test_a_slot_of_its_own_and_loraplus_count() -> None:
    assert rate(slots={"B": {"mode": "lora", "rank": 4, "alpha": 32}}) == BASE_RATE / 2
    assert auto_rate(AdapterSection(), BASE_WIDTH, "a model", 4.0).lr == BASE_RATE / 4
    assert rate(method="lora", alpha=16, peft={"init_lora_weights": True, "rank_pattern": {"q_proj": 4}}) == BASE_RATE


def test_it_falls_with_the_width() -> None:
    assert rate(width=4096) == pytest.approx(BASE_RATE * (BASE_WIDTH / 4096) ** 0.781, rel=5e-3)


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"method": "full"}, "trained as a whole wants about a tenth"),
        ({"method": "ia3"}, "follows no rule"),
        ({"slots": {"E": "vector"}}, "Set adapter.scaling=even"),
        ({"preset": "bitfit"}, "Set adapter.scaling=even"),
        ({"method": "lora", "peft": {"use_rslora": True}}, "adapter.peft sets use_rslora"),
        ({"method": "dora", "peft": {"init_lora_weights": "pissa"}}, "adapter.peft sets init_lora_weights"),
    ],
)
def test_what_has_no_such_rate_is_refused(adapter: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_rate(AdapterSection(**adapter))


def test_slots_without_b_are_taken_in_even_scaling() -> None:
    assert rate(slots={"E": "vector"}, scaling="even") == BASE_RATE
    assert rate(slots={"B": {"mode": "lora", "rank": 2}}) == BASE_RATE


def test_a_model_without_a_single_width_is_refused() -> None:
    from transformers import GPT2Config, LlamaConfig, ResNetConfig

    assert width_of(LlamaConfig(hidden_size=64)) == 64
    assert width_of(GPT2Config(n_embd=48)) == 48
    assert width_of(ResNetConfig()) is None
    with pytest.raises(UserError, match="has no single hidden_size"):
        auto_rate(AdapterSection(), width_of(ResNetConfig()), "resnet")
