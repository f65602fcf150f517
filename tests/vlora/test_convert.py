"""From dense models and back: full rank keeps the outputs, a rank loses what the report says, transformers loads."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from glora_llm.vlora import VLoRAConfig, VLoRALinear, from_dense, increments, m_steps, to_dense, vlora_layers
from tests.vlora.conftest import IDS, IMAGES, fill, shared, small_llama, small_vit, stack

FULL = {"q_proj": 16, "k_proj": 8, "v_proj": 8, "o_proj": 16, "gate_proj": 16, "up_proj": 16, "down_proj": 16}


def drifting(layers: int = 4) -> Any:
    """A stack whose layers differ little from one to the next, as the method assumes."""
    model = stack((8, 6), layers)
    with torch.no_grad():
        for before, layer in zip(model, list(model)[1:], strict=False):
            layer[0].weight.copy_(before[0].weight + 0.1 * torch.randn(6, 8, dtype=torch.float64))
    return model


@pytest.mark.parametrize("topology", ["chain", "star"])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_full_rank_keeps_the_logits(topology: str, alpha: float | None) -> None:
    model = small_llama().eval()
    before = model(IDS).logits
    config = VLoRAConfig(rank=FULL, layers_per_compound=None, topology=topology, alpha=alpha, targets=list(FULL))
    fits = from_dense(model, model.model.layers, config)
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-3, atol=1e-4)
    assert len(fits) == len(vlora_layers(model)) == 21
    assert all(fit.weight_error < 1e-5 for fit in fits)


@pytest.mark.parametrize("topology", ["chain", "star"])
@torch.no_grad()
def test_the_report_is_what_the_weights_lost_and_falls_with_the_rank(topology: str) -> None:
    totals = []
    for rank in (1, 2, 4, 6):
        model, dense = drifting(), drifting()
        dense.load_state_dict(model.state_dict())
        fits = from_dense(model, list(model), VLoRAConfig(rank=rank, layers_per_compound=2, topology=topology))
        assert [(fit.layer, fit.linear, fit.rank) for fit in fits] == [(1, "0", rank), (3, "0", rank)]
        for fit in fits:
            wanted, got = dense[fit.layer][0].weight, model[fit.layer][0].weight
            lost = (wanted - got).norm()
            assert fit.weight_error == pytest.approx(float(lost / wanted.norm()), abs=1e-9)
            assert fit.increment_error == pytest.approx(
                float(lost / (wanted - dense[fit.layer - 1][0].weight).norm()), abs=1e-9
            )
        totals.append(sum(fit.weight_error for fit in fits))
    assert totals == sorted(totals, reverse=True) and totals[-1] < 1e-12 < totals[-2]


@torch.no_grad()
def test_an_increment_is_the_best_of_its_rank_from_the_truncated_weight_before() -> None:
    """Eckart-Young, and in a chain each step starts from what the previous layer has become."""
    model, dense = drifting(), drifting()
    dense.load_state_dict(model.state_dict())
    fits = from_dense(model, list(model), VLoRAConfig(rank=2, layers_per_compound=None))
    for number, fit in enumerate(fits, start=1):
        difference = dense[number][0].weight - model[number - 1][0].weight
        tail = torch.linalg.svdvals(difference)[2:].norm()
        assert fit.increment_error == pytest.approx(float(tail / difference.norm()))


def test_equal_layers_lose_nothing() -> None:
    model = stack((6, 6))
    for layer in model:
        layer.load_state_dict(model[0].state_dict())
    fits = from_dense(model, list(model), VLoRAConfig(rank=1))
    assert [fit.increment_error for fit in fits] == [fit.weight_error for fit in fits] == [0.0] * 3


@pytest.mark.parametrize("tied", [True, False])
def test_plain_transformers_loads_what_to_dense_wrote(tied: bool, tmp_path: Path) -> None:
    model: Any = small_llama(tie_word_embeddings=tied).eval()
    shared(model, model.model.layers)
    before = model(IDS).logits
    dense: Any = to_dense(model)
    assert dense is model and not vlora_layers(model)
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-5)
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) == tied
    dense.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert {type(module) for module in again.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    assert torch.equal(again(IDS).logits, dense(IDS).logits)


def test_plain_transformers_loads_a_vit(tmp_path: Path) -> None:
    model = small_vit().eval()
    shared(model, model.vit.layers, topology="star")
    before = model(IMAGES).logits
    to_dense(model).save_pretrained(tmp_path)  # type: ignore[operator]
    again = AutoModelForImageClassification.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(again(IMAGES).logits, before, rtol=1e-4, atol=1e-5)


def test_dense_weights_are_their_own_and_trainable_like_the_base() -> None:
    model = stack((6, 6))
    shared(model, list(model))
    model[0][0].weight.requires_grad_(False)
    to_dense(model)
    assert [layer[0].weight.requires_grad for layer in model] == [False, False, True, True]
    assert all(layer[0].bias.requires_grad for layer in model)
    with torch.no_grad():
        model[0][0].weight.zero_()
    assert model[1][0].weight.abs().max() > 0


def test_increments_are_frobenius_norms_and_shares_of_the_base() -> None:
    model = small_llama()
    shared(model, model.model.layers, layers_per_compound=4, alpha=5.0)
    sizes = increments(model)
    assert len(sizes) == 21
    for name, layer in vlora_layers(model).items():
        norm = (layer.scale * layer.increment_b @ layer.increment_a).norm()
        assert sizes[name].norm == pytest.approx(float(norm), rel=1e-5)
        assert sizes[name].share == pytest.approx(float(norm / layer._base[0].weight.norm()), rel=1e-5)


def test_increments_of_a_zero_base_and_of_zero_increments() -> None:
    model = stack((6, 6))
    shared(model, list(model))
    with torch.no_grad():
        model[0][0].weight.zero_()
    assert increments(model)["1.0"].share == math.inf
    fill(model, std=0.0)
    assert increments(model)["1.0"].share == increments(model)["3.0"].norm == 0.0


def test_there_and_back_keeps_the_layer_kinds() -> None:
    model = stack((6, 6))
    from_dense(model, list(model), VLoRAConfig(rank=6))
    assert [type(layer[0]) for layer in model] == [nn.Linear, VLoRALinear, VLoRALinear, VLoRALinear]
    to_dense(model)
    assert [type(layer[0]) for layer in model] == [nn.Linear] * 4


def test_the_m_step_of_a_layer_is_that_of_its_linears() -> None:
    model = small_llama()
    shared(model, model.model.layers, alpha=3.0)
    found, sizes = m_steps(model.model.layers), increments(model)
    assert list(found) == [1, 3], "layers 0 and 2 hold the bases"
    for layer, size in found.items():
        parts = [part.norm for name, part in sizes.items() if f"layers.{layer}." in name]
        assert len(parts) == 7 and size == pytest.approx(math.hypot(*parts), rel=1e-6)
    assert m_steps(small_llama().model.layers) == {}
