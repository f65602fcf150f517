"""GLoRA on a quantised base: its dense twin, which holds the dequantised weights, says what is right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from glora_llm.glora import layer as glora_layer
from glora_llm.glora.frozen_weight import dense_weight
from glora_llm.glora.linear import glora_linear
from glora_llm.models.load import linear_names, load_base
from glora_llm.models.resolve import ResolvedModel
from glora_llm.schema import ModelSection
from tests.glora.conftest import ALL_MODES, IDS, Fill, glora, logits

CPU = torch.device("cpu")


def quantised_and_twin(quantization: Any, tiny: ResolvedModel) -> tuple[Any, Any]:
    """The quantised base, and plain linears that hold what it unpacks to."""
    base = load_base(ModelSection(name_or_path="x", quantization=quantization), tiny.folder, CPU)
    twin = load_base(ModelSection(name_or_path="x"), tiny.folder, CPU)
    for name in linear_names(base):
        twin.get_submodule(name).weight.data = dense_weight(base.get_submodule(name)).float().clone()
    return base, twin


@pytest.mark.parametrize("composition", ["product", "hadamard"])
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_a_quantised_base_is_its_dense_twin(
    quantization: str, composition: str, tiny: ResolvedModel, fill: Fill
) -> None:
    outputs, gradients = [], []
    for base in quantised_and_twin(quantization, tiny):
        model = glora(base, slots=ALL_MODES, composition=composition)
        fill(model)
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        outputs.append(out.logits.detach())
        gradients.append({name: value.grad for name, value in model.named_parameters() if "slot_" in name})
        assert all(value.grad is None for name, value in model.named_parameters() if "slot_" not in name)
    assert outputs[0].std() > 0.1
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    assert len(gradients[0]) == 2 * 7 * 7
    for name, gradient in gradients[0].items():
        largest = float(gradients[1][name].abs().max())
        assert largest > 0
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4 * largest, msg=name)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_merges_into_a_dense_model(
    quantization: str, tiny: ResolvedModel, fill: Fill, tmp_path: Path
) -> None:
    base, _ = quantised_and_twin(quantization, tiny)
    model = glora(base, slots=ALL_MODES)
    fill(model)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert {type(merged.get_submodule(name)) for name in linear_names(merged)} == {nn.Linear}
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert getattr(again.config, "quantization_config", None) is None
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


def test_a_quantised_base_unmerges_exactly(tiny: ResolvedModel, fill: Fill) -> None:
    base, _ = quantised_and_twin("nf4", tiny)
    model = glora(base, slots=ALL_MODES)
    fill(model)
    expected = logits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


def test_an_adapter_of_a_quantised_base_reloads(tiny: ResolvedModel, fill: Fill, tmp_path: Path) -> None:
    model = glora(quantised_and_twin("nf4", tiny)[0], slots=ALL_MODES)
    fill(model)
    expected = logits(model)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(quantised_and_twin("nf4", tiny)[0], str(tmp_path)).eval()
    assert torch.equal(logits(again), expected)


def int8_model(dtype: Any, tiny: ResolvedModel, fill: Fill) -> Any:
    section = ModelSection(name_or_path="x", quantization="int8", dtype=dtype)
    model = glora(load_base(section, tiny.folder, CPU), slots=ALL_MODES)
    fill(model)
    return model


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_int8_computes_in_the_dtype_of_its_input(
    dtype: str, tiny: ResolvedModel, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    def spy(x: torch.Tensor, read_weight: Any, *args: Any) -> torch.Tensor:
        seen.append((x.dtype, read_weight().dtype))
        return glora_linear(x, read_weight, *args)

    monkeypatch.setattr(glora_layer, "glora_linear", spy)
    model = int8_model(dtype, tiny, fill)
    assert logits(model).dtype == getattr(torch, dtype)
    assert seen == [(getattr(torch, dtype), getattr(torch, dtype))] * 14


def test_a_merged_int8_layer_holds_the_weight_of_training(tiny: ResolvedModel, fill: Fill) -> None:
    model = int8_model("bfloat16", tiny, fill)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    w0 = dense_weight(layer.get_base_layer(), torch.bfloat16).float()
    values = layer.slots("default")
    thin = values.a_scale * (w0 @ values.a_down) @ values.a_up + values.b_scale * values.b_down @ values.b_up
    torch.testing.assert_close(layer.merged_weight(["default"])[0], w0 + thin, rtol=1e-6, atol=1e-7)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert {value.dtype for value in merged.parameters()} == {torch.bfloat16}
    assert (logits(merged) - expected).float().abs().mean() < 0.02 * expected.float().std()
