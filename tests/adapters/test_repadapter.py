"""RepAdapter: the formula, written naively by hooks; where it goes; and an exact merge."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from glora_llm.adapters.repadapter import RepAdapterConfig, RepAdapterLayer
from glora_llm.errors import AdapterError, UserError
from tests.adapters.module_models import FAMILIES, SIZES, batch, perturb, require_learning, tiny_model

INPUTS = {  # the linears that read the adapted inputs of a block, in the order of the model
    "llama": {"self_attn": ["q_proj", "k_proj", "v_proj"], "mlp": ["gate_proj", "up_proj"]},
    "gemma": {"self_attn": ["q_proj", "k_proj", "v_proj"], "mlp": ["gate_proj", "up_proj"]},
    "gpt2": {"attn": ["c_attn"], "mlp": ["c_fc"]},
    "opt": {"self_attn": ["k_proj", "v_proj", "q_proj"], "fc1": [""]},
    "neox": {"attention": ["query_key_value"], "mlp": ["dense_h_to_4h"]},
    "bert": {"attention.self": ["query", "key", "value"], "intermediate": ["dense"]},
    "vit": {"attention": ["q_proj", "k_proj", "v_proj"], "mlp": ["fc1"]},
}


def adapted(family: str, **settings: Any) -> Any:
    model = get_peft_model(tiny_model(family), RepAdapterConfig(**settings), autocast_adapter_dtype=False)
    perturb(model, 0.2)
    return model.eval()


def layers_of(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, RepAdapterLayer)}


def naive(adapter: Any, x: Tensor) -> Tensor:
    """x + s (U (D x + d) + u): a group of outputs sees its part of the hidden values, as in a grouped convolution."""
    columns = x.reshape(1, -1, x.shape[-1]).transpose(1, 2)
    hidden = nn.functional.conv1d(columns, adapter.down[:, :, None], adapter.down_bias)
    up = nn.functional.conv1d(hidden, adapter.up[:, :, None], adapter.up_bias, groups=adapter.groups)
    return x + adapter.scale * up.transpose(1, 2).reshape(x.shape)


def by_hooks(family: str, model: Any) -> Any:
    """Return a fresh base whose linears are given the adapted input, each by itself."""
    fresh = tiny_model(family)
    for name, layer in layers_of(model).items():
        for reader in layer.readers:
            linear = fresh.get_submodule(f"{name}.{reader}".rstrip("."))
            adapter = layer.repadapter_block["default"]
            linear.register_forward_pre_hook(lambda _, x, adapter=adapter: (naive(adapter, x[0]),))
    return fresh


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_formula_and_merge(family: str) -> None:
    model = adapted(family, scale=0.5, groups=4)
    plain = tiny_model(family)(**batch(family)).logits
    logits = model(**batch(family)).logits
    torch.testing.assert_close(logits, by_hooks(family, model)(**batch(family)).logits, rtol=1e-12, atol=1e-12)
    assert (logits - plain).abs().max() > 1e-3
    for name, layer in layers_of(model).items():
        assert layer.readers == next(found for part, found in INPUTS[family].items() if name.endswith(f".{part}"))
    with model.disable_adapter():
        assert torch.equal(model(**batch(family)).logits, plain)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(**batch(family)).logits, logits, rtol=1e-9, atol=1e-9)
    model.unmerge_adapter()
    assert torch.equal(model(**batch(family)).logits, logits)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, RepAdapterLayer) for module in merged.modules())
    torch.testing.assert_close(merged(**batch(family)).logits, logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_it_learns_as_the_formula(family: str) -> None:
    """From the authors' start, at which U is zero."""
    torch.manual_seed(0)
    config = RepAdapterConfig(scale=5.0, groups=4)
    model = get_peft_model(tiny_model(family), config, autocast_adapter_dtype=False).double()
    require_learning(model, lambda: by_hooks(family, model), family)


@pytest.mark.parametrize(("places", "count"), [(["attention"], 2), (["feed_forward", "attention"], 4)])
def test_places_and_parameters(places: list[str], count: int) -> None:
    """RepAttn and RepBlock of the authors: r (I + 1) + I (r / g + 1) numbers a place."""
    model = get_peft_model(tiny_model("vit"), RepAdapterConfig(places=places, r=8, groups=2))
    assert len(layers_of(model)) == count
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == count * (8 * 33 + 32 * 5)
    assert torch.equal(model(**batch("vit")).logits, tiny_model("vit")(**batch("vit")).logits)


@torch.no_grad()
def test_two_adapters_save_and_load(tmp_path: Any) -> None:
    """They are applied one after the other, and merged so."""
    model = adapted("llama")
    one = model(**batch("llama")).logits
    model.save_pretrained(tmp_path)
    model.add_adapter("second", RepAdapterConfig(r=4, places=["attention"]))
    model.base_model.set_adapter(["default", "second"])
    perturb(model, 0.2)
    both = model(**batch("llama")).logits
    model.merge_adapter()
    torch.testing.assert_close(model(**batch("llama")).logits, both, rtol=1e-9, atol=1e-9)
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, autocast_adapter_dtype=False).eval()
    assert torch.equal(again(**batch("llama")).logits, one)


def test_without_bias() -> None:
    """Linears without bias stay so, and the layer says where one would be added."""
    assert layers_of(adapted("llama"))["model.layers.0.mlp"].added_biases() == ["gate_proj", "up_proj"]
    model = adapted("llama", with_bias=False)
    assert not any(layer.added_biases() for layer in layers_of(model).values())
    assert not any(m.bias is not None for m in model.merge_and_unload().modules() if isinstance(m, nn.Linear))


def test_wrong_arguments() -> None:
    cases: dict[str, dict[str, Any]] = {
        "groups is 3 and the rank is 8": {"groups": 3},
        "places is .'mlp'.; expected one or both of attention, feed_forward": {"places": ["mlp"]},
        "scale is 0": {"scale": 0.0},
        "dropout is 1": {"dropout": 1.0},
    }
    for message, given in cases.items():
        with pytest.raises(AdapterError, match=message):
            RepAdapterConfig(**given)
    with pytest.raises(AdapterError, match="5 groups do not divide the 32 inputs"):
        get_peft_model(tiny_model("llama"), RepAdapterConfig(r=10, groups=5))


def test_models_without_its_places() -> None:
    with pytest.raises(UserError, match="No blocks with attention and feed-forward modules"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), RepAdapterConfig())
    mixtral = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2, num_key_value_heads=2))
    with pytest.raises(AdapterError, match="mlp: RepAdapter goes before attention and feed-forward modules"):
        get_peft_model(mixtral, RepAdapterConfig())
    get_peft_model(mixtral, RepAdapterConfig(places=["attention"]))
