"""GLoRA on a quantised base: its dense twin, which holds the dequantised weights, says what is right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from glora_llm.glora.frozen_weight import dense_weight
from glora_llm.models.load import linear_names, load_base
from glora_llm.models.resolve import ResolvedModel
from glora_llm.schema import ModelSection
from tests.glora.conftest import ALL_MODES, IDS, Fill, glora, logits

CPU = torch.device("cpu")


def quantised_and_twin(quantization: Any, tiny: ResolvedModel) -> tuple[Any, Any]:
    """The quantised base, and plain linears that hold what it unpacks to."""
    base = load_base(ModelSection(name_or_path="x", quantization=quantization), tiny.folder, CPU, zero3=False)
    twin = load_base(ModelSection(name_or_path="x"), tiny.folder, CPU, zero3=False)
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
