"""Scales by a layer's own weight: one step of Adam moves the output alike, whatever W0's size, slot and division."""

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from glora_llm.adapters.even import even_scales, set_scales
from glora_llm.adapters.inject import adapted_layers
from glora_llm.glora import GLoRAConfig
from glora_llm.glora.path import LayerPath

WIDE, NARROW, ROWS = 96, 64, 512


class Net(nn.Module):
    """One linear with a bias."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDE, NARROW)
        with torch.no_grad():
            self.linear.weight.mul_(size)
            self.linear.bias.mul_(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(x)
        return found


def even(base: nn.Module, seed: int = 0, **arguments: Any) -> Any:
    model = get_peft_model(copy.deepcopy(base), GLoRAConfig(seed=seed, **arguments))  # type: ignore[arg-type]
    set_scales(model, even_scales(model))
    return model


def moved(model: Any, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Return by how much the output changes in one step of Adam at rate 1e-3, where dy comes back."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = model(x)
    (before * dy).sum().backward()
    optimizer.step()
    change: torch.Tensor = (model(x) - before).detach()
    return change


@pytest.fixture(autouse=True)
def no_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The law alone: constants of slots are measured, and say by how much each is slower for its own reasons."""
    monkeypatch.setattr("glora_llm.adapters.even.CONSTANTS", {})


SLOTS = {
    "A lora": {"slots": {"A": "lora"}},
    "A hadamard": {"slots": {"A": "lora"}, "composition": "hadamard"},
    "A vector": {"slots": {"A": "vector"}},
    "C vector": {"slots": {"C": "vector"}},
    "D vector": {"slots": {"D": "vector"}},
}


@pytest.mark.parametrize("arguments", SLOTS.values(), ids=SLOTS)
def test_a_weight_ten_times_as_large_moves_the_output_alike(arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    small = Net(1.0)
    large = copy.deepcopy(small)
    with torch.no_grad():
        large.linear.weight.mul_(10)
        large.linear.bias.mul_(10)
    x, dy = torch.randn(ROWS, WIDE), torch.randn(ROWS, NARROW)
    expected = moved(even(small, **arguments), x, dy)
    assert expected.abs().max() > 0
    torch.testing.assert_close(moved(even(large, **arguments), x, dy), expected, rtol=2e-3, atol=1e-5)


def test_factors_are_saved_and_loaded_and_merge_exactly(tmp_path: Any) -> None:
    from peft import PeftModel

    torch.manual_seed(0)
    base = Net(7.0)
    model = even(base, slots={"A": "lora", "B": "lora", "C": "lora", "D": "scalar", "E": "vector"}, rank=4)
    x, dy = torch.randn(ROWS, WIDE), torch.randn(ROWS, NARROW)
    moved(model, x, dy)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert adapted_layers(loaded)["linear"].scales == adapted_layers(model)["linear"].scales
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(loaded.merge_and_unload()(x), model(x))


OTHER_SLOTS = {
    "A block": {"slots": {"A": "block"}},
    "A lora": {"slots": {"A": "lora"}},
    "A hadamard": {"slots": {"A": "lora"}, "composition": "hadamard"},
    "A vector": {"slots": {"A": "vector"}},
    "B vector": {"slots": {"B": "vector"}},
    "C vector": {"slots": {"C": "vector"}},
    "C lora": {"slots": {"C": "lora"}},
    "E vector": {"slots": {"E": "vector"}},
}


@pytest.mark.parametrize(("width", "alpha"), [(64, 1), (256, 16)])
@pytest.mark.parametrize("arguments", OTHER_SLOTS.values(), ids=OTHER_SLOTS)
def test_every_slot_moves_the_output_as_b_does(arguments: dict[str, Any], width: int, alpha: int) -> None:
    """Within a factor of four, at any width, alpha and size of the weight; without scales they are apart by these."""
    torch.manual_seed(0)
    base = nn.Linear(width, width, bias=False)
    with torch.no_grad():
        base.weight.mul_(30)
    net = nn.Sequential(base)
    x, dy = torch.randn(ROWS, width), torch.randn(ROWS, width)

    def size(**more: Any) -> float:  # of several starts: `up` may be a single random number
        adapted = (even(net, rank=1, alpha=alpha, target_modules=["0"], seed=seed, **more) for seed in range(5))
        return float(torch.stack([moved(model, x, dy).square().mean() for model in adapted]).mean().sqrt())

    ratio = size(**arguments) / size(slots={"B": "lora"})
    assert 1 / 4 < ratio < 4, ratio


def test_ranks_move_the_output_of_one_token_alike() -> None:
    """The columns move together there; what RANK_EXPONENT differs from 1 by is for those that do not."""
    from glora_llm.adapters.auto_rate import RANK_EXPONENT

    torch.manual_seed(0)
    base, x, dy = Net(3.0), torch.randn(1, WIDE), torch.randn(1, NARROW)
    for slots in ({"A": "lora"}, {"B": "lora"}):
        sizes = [
            sum(float(moved(even(base, seed, slots=slots, rank=rank), x, dy).norm()) for seed in range(5))
            for rank in (4, 64)
        ]
        assert sizes[1] / sizes[0] == pytest.approx(16 ** (1 - RANK_EXPONENT), rel=0.4)


def test_slots_of_a_layer_share_out_what_one_alone_moves() -> None:
    torch.manual_seed(0)
    base, x, dy = Net(3.0), torch.randn(1, WIDE), torch.randn(1, NARROW)

    def size(slots: dict[str, str]) -> float:
        return sum(float(moved(even(base, seed, slots=slots, rank=4), x, dy).norm()) for seed in range(5))

    together = size({"A": "lora", "B": "lora", "D": "vector", "E": "vector"})
    assert together == pytest.approx(size({"B": "lora"}), rel=0.5)


def test_rate_and_alpha_act_by_their_product() -> None:
    """Twice the alpha moves twice as far, in slots with a rank and without, and rank-stabilised too."""
    torch.manual_seed(0)
    base, x, dy = Net(3.0), torch.randn(ROWS, WIDE), torch.randn(ROWS, NARROW)
    for slots in ({"A": "lora"}, {"A": "vector"}, {"B": "vector"}, {"C": "lora"}, {"D": "scalar"}, {"E": "vector"}):
        for stabilized in (False, True):
            more: dict[str, Any] = {"slots": slots, "rank": 4, "rank_stabilized": stabilized}
            one, two = (moved(even(base, alpha=alpha, **more), x, dy) for alpha in (8, 16))
            torch.testing.assert_close(two, 2 * one, rtol=2e-3, atol=1e-4)


def test_a_lookup_moves_in_proportion_to_its_rows() -> None:
    torch.manual_seed(0)
    rows = torch.randn(50, 64)
    small, large = (nn.Sequential(nn.Embedding.from_pretrained(size * rows)) for size in (1, 10))
    tokens, dy = torch.arange(50), torch.randn(50, 64)
    for slots in ({"A": "lora"}, {"A": "vector"}, {"B": "lora"}, {"B": "vector"}, {"E": "vector"}):
        one, ten = (moved(even(net, slots=slots, target_modules=["0"]), tokens, dy) for net in (small, large))
        torch.testing.assert_close(ten, 10 * one, rtol=2e-3, atol=1e-4)


def test_a_genome_that_is_trained_anew_has_no_scales_of_its_supernet() -> None:
    """There all ranks have alpha / the largest one; alone, each moves the output as far as the largest."""
    totals = []
    for rank in (8, 2):
        genome = {"linear": {"B": {"mode": "lora", "rank": rank, "scale": 16 / 8}}}
        layer = adapted_layers(even(Net(1.0), alpha=16, rank=8, genome=genome))["linear"]
        totals.append(layer.path["default"]["B"].scale * layer.factor("default", "B", "lora") * rank)
    assert totals == [16, 16]


def test_a_supernet_has_a_factor_for_every_mode() -> None:
    torch.manual_seed(0)
    model = even(Net(5.0), supernet={"modes": {"A": ["lora", "vector"], "E": ["vector", "none"]}, "ranks": [4, 2]})
    layer = adapted_layers(model)["linear"]
    found = layer.scales["default"]
    assert set(found["A"]) == {"lora", "vector"}
    assert set(found["E"]) == {"vector"}
    assert set(found["B"]) == {"lora", "vector", "scalar"}
    assert found["A"]["vector"] == pytest.approx(16 * found["A"]["lora"], rel=1e-5) and found["A"]["lora"] != 1


def test_ranks_of_a_supernet_move_the_output_alike() -> None:
    """Also where they share columns: each has alpha over its own rank."""
    torch.manual_seed(0)
    base, x, dy = Net(3.0), torch.randn(1, WIDE), torch.randn(1, NARROW)
    for slot in "AB":
        sizes = {16: 0.0, 4: 0.0}
        for seed, rank in ((seed, rank) for seed in range(5) for rank in sizes):
            model = even(base, seed, supernet={"ranks": [16, 4]}, scaling="even")
            layer = adapted_layers(model)["linear"]
            spec = next(spec for spec in layer.choices["default"][slot] if spec.rank == rank)
            layer.path["default"] = LayerPath(((slot, spec),))
            sizes[rank] += float(moved(model, x, dy).norm())
        assert sizes[4] / sizes[16] == pytest.approx(1, rel=0.4)


def test_stacked_experts_have_no_single_size() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from glora_llm.adapters.even import require_even
    from glora_llm.errors import UserError

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    config = GLoRAConfig(target_modules=["experts"], slots={"A": "lora", "B": "lora"})
    model = get_peft_model(MixtralForCausalLM(MixtralConfig(**sizes, **heads)), config)
    with pytest.raises(UserError, match="stacks those of several experts"):
        require_even(model)
