"""LoRA and our GLoRA on top of a VLoRA model: wrapping, training, merging."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from glora_llm.errors import UserError
from glora_llm.glora import GLoRAConfig
from glora_llm.vlora import VLoRALinear, to_dense, vlora_layers
from tests.vlora.conftest import IDS, gradients, same, shared, small_llama

TARGETS = ["q_proj", "down_proj"]
CONFIGS = {
    "lora": lambda: LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False),
    "glora": lambda: GLoRAConfig(rank=2, target_modules=TARGETS, seed=0, slots={"A": "lora", "B": "lora"}),
}


def base(topology: str = "chain") -> Any:
    model = small_llama()
    return shared(model, model.model.layers, topology=topology).eval()


def adapted(model: Any, kind: str) -> Any:
    """The adapter on the model, with values that do something."""
    made = get_peft_model(model, CONFIGS[kind]()).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in made.parameters():
            if value.requires_grad:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return made


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("topology", ["chain", "star"])
def test_an_adapter_computes_and_learns_as_on_the_dense_model(kind: str, topology: str) -> None:
    got, dense = adapted(base(topology), kind), adapted(to_dense(base(topology)), kind)
    assert len(vlora_layers(got)) == 14 and not vlora_layers(dense)
    assert not any(value.requires_grad for name, value in got.named_parameters() if "increment_" in name)
    torch.testing.assert_close(got(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got(IDS).logits, base(topology)(IDS).logits, atol=1e-2)
    losses = [model(IDS).logits.square().mean() for model in (got, dense)]
    same(gradients(got, losses[0]), gradients(dense, losses[1]))


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_merges_after_to_dense(kind: str) -> None:
    model = adapted(base(), kind)
    before = model(IDS).logits
    merged = to_dense(model).merge_and_unload()  # type: ignore[operator]
    torch.testing.assert_close(merged(IDS).logits, before, rtol=1e-4, atol=1e-5)
    assert not any("increment_" in name or "base_layer" in name for name in merged.state_dict())


def test_glora_merges_straight_too() -> None:
    """It puts a new dense linear in each place; what it did not target stays VLoRA."""
    model = adapted(base(), "glora")
    before = model(IDS).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, before, rtol=1e-4, atol=1e-5)
    assert len(vlora_layers(merged)) == 10


@pytest.mark.parametrize("safe", [True, False])
def test_lora_cannot_be_merged_into_a_composed_weight_and_says_what_to_do(safe: bool) -> None:
    layer: Any = adapted(base(), "lora").base_model.model.model.layers[1].self_attn.q_proj
    assert isinstance(layer.base_layer, VLoRALinear)
    before = layer.base_layer.weight.clone()
    with pytest.raises(UserError, match=r"composed of its compound's base.*to_dense\(model\) first, then merge"):
        layer.merge(safe_merge=safe)
    assert torch.equal(layer.base_layer.weight, before)


def test_the_weight_reads_as_a_plain_differentiable_tensor() -> None:
    layer: Any = base().model.layers[1].self_attn.q_proj
    weight = layer.weight
    assert (layer.in_features, layer.out_features, layer.bias) == (16, 16, None)
    assert type(weight * 1) is type(weight.detach()) is type(weight.data) is torch.Tensor
    assert not weight.data.requires_grad and weight.requires_grad
    weight.sum().backward()
    assert layer._base[0].weight.grad is not None and layer.increment_b.grad is not None
