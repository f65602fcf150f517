"""GLoRA as PEFT sees it: merging, unmerging, and the plain model that comes out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from glora_llm.glora import GLoRAConfig
from tests.glora.conftest import ALL_MODES, Fill, Llama, glora, glora_layers, logits, slot_values


def test_active_adapters_add_their_updates(fill: Fill) -> None:
    torch.manual_seed(0)
    base = nn.Linear(7, 5, dtype=torch.float64)
    model = glora(nn.Sequential(base), target_modules=["0"], slots=ALL_MODES)
    model.add_adapter("other", GLoRAConfig(target_modules=["0"], slots={"A": "vector", "D": "vector", "E": "vector"}))
    fill(model, std=1.0)
    x = torch.randn(4, 7, dtype=torch.float64)
    alone = []
    for name in ("default", "other"):
        model.base_model.set_adapter(name)
        alone.append(model(x))
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    torch.testing.assert_close(both, alone[0] + alone[1] - base(x))
    model.merge_adapter()
    torch.testing.assert_close(model(x), both)
    model.unmerge_adapter()
    assert torch.equal(model(x), both)
    model.merge_adapter(adapter_names=["default"])
    torch.testing.assert_close(model(x), alone[0])
    model.merge_adapter(adapter_names=["other"])  # on top: it still acts on the original W0
    torch.testing.assert_close(model(x), both)


@pytest.mark.parametrize("composition", ["product", "hadamard"])
def test_merging_and_unmerging(composition: str, llama: Llama, fill: Fill) -> None:
    base = logits(llama())
    model = glora(llama(), slots=ALL_MODES, composition=composition)
    fill(model)
    expected = logits(model)
    model.merge_adapter()
    assert all(layer.merged for layer in glora_layers(model).values())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize(
    ("keys", "switches"),
    [
        ({}, {"attention_bias": True, "mlp_bias": True}),
        ({"target_modules": ["q_proj"]}, {"attention_bias": True, "mlp_bias": False}),
        ({"target_modules": ["down_proj", "v_proj"], "slots": {"E": "vector"}}, dict.fromkeys(["mlp_bias"], True)),
        ({"slots": {"A": "lora", "B": "lora"}}, {"attention_bias": False, "mlp_bias": False}),
    ],
)
def test_merged_and_reloaded_by_plain_transformers(
    keys: dict[str, Any], switches: dict[str, bool], llama: Llama, fill: Fill, tmp_path: Path
) -> None:
    model = glora(llama(), **{"slots": ALL_MODES, **keys})
    fill(model)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is LlamaForCausalLM and not any("slot_" in name for name in merged.state_dict())
    merged.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {name: getattr(again.config, name) for name in switches} == switches
    torch.testing.assert_close(logits(again.eval()), expected, rtol=1e-4, atol=1e-5)


def test_a_bias_that_is_there_is_merged_into(llama: Llama, fill: Fill) -> None:
    model = glora(llama(attention_bias=True), target_modules=["q_proj", "v_proj"], slots=ALL_MODES | {"D": "vector"})
    with torch.no_grad():
        for layer in glora_layers(model).values():
            layer.bias.normal_(generator=torch.Generator().manual_seed(0))
    fill(model)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_a_family_without_the_switch_is_warned_about(fill: Fill) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=16,
        intermediate_size=24,
        vocab_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = glora(MistralForCausalLM(config), slots={"E": "vector"})
    fill(model)
    with pytest.warns(UserWarning, match=r"7 linears, where a mistral model .* none: model\.layers\.0\.mlp\.down_proj"):
        model.merge_and_unload()


def test_modules_to_save(llama: Llama, fill: Fill, tmp_path: Path) -> None:
    model = glora(llama(), modules_to_save=["lm_head"])
    trained = {name for name, value in model.named_parameters() if value.requires_grad} - set(slot_values(model))
    assert len(trained) == 1 and "lm_head.modules_to_save.default.weight" in next(iter(trained))
    fill(model)
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    expected = logits(model)
    model.save_pretrained(str(tmp_path))
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), str(tmp_path)).eval()), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_model_keeps_its_dtype(llama: Llama, fill: Fill) -> None:
    model = glora(llama().to(torch.bfloat16), slots=ALL_MODES)
    fill(model)
    assert {value.dtype for value in slot_values(model).values()} == {torch.float32}  # PEFT keeps adapters in float32
    expected = logits(model)
    assert expected.dtype == torch.bfloat16
    merged = model.merge_and_unload()
    assert {value.dtype for value in merged.parameters()} == {torch.bfloat16}
    assert (logits(merged) - expected).float().abs().mean() < 0.05 * expected.float().std()
