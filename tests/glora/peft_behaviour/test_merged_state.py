"""What a merged layer shows of itself: one weight, as PEFT's LoRA; and the base comes back bit for bit."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from tests.glora.conftest import glora_layers, logits
from tests.glora.peft_behaviour.conftest import TUNERS, Two, parameters, said


@pytest.mark.parametrize("tuner", TUNERS)
def test_no_weight_is_there_twice(tuner: str, two: Two, tmp_path: Path) -> None:
    model = two(tuner)
    before, count, adapter = (
        parameters(model),
        model.num_parameters(),
        get_peft_model_state_dict(model, adapter_name="first"),
    )
    model.merge_adapter()
    gained = {name for name in parameters(model) - before if not name.endswith(".base_layer.bias")}
    assert not gained and before <= parameters(model)
    biases = sum(p.numel() for name, p in model.named_parameters() if name not in before)
    assert model.num_parameters() == count + biases
    assert set(model.state_dict()) - {name for name, _ in model.named_buffers()} == parameters(model)
    assert get_peft_model_state_dict(model, adapter_name="first").keys() == adapter.keys()
    model.save_pretrained(str(tmp_path), selected_adapters=["first"])
    saved = load_file(tmp_path / "first" / "adapter_model.safetensors")
    assert sum(value.numel() for value in saved.values()) == sum(value.numel() for value in adapter.values())


def test_the_base_comes_back(two: Two) -> None:
    model = two("glora")
    bases = {name: layer.base_layer for name, layer in glora_layers(model).items()}
    expected = logits(model)
    for names in (["first"], ["other"]):
        model.merge_adapter(names)
    with model.disable_adapter():  # disabled, a merged layer is unmerged, as LoRA's
        logits(model)
    assert all(layer.base_layer is bases[name] for name, layer in glora_layers(model).items())
    assert torch.equal(logits(model), expected)


def test_a_merged_model_is_cast_and_copied_with_its_base(two: Two) -> None:
    model = two("glora")
    model.merge_adapter()
    other: Any = copy.deepcopy(model).to(torch.float64)
    other.unmerge_adapter()
    layers, originals = glora_layers(other), glora_layers(model)
    assert all(layer.weight.dtype == torch.float64 for layer in layers.values())
    model.unmerge_adapter()
    assert all(torch.equal(layer.weight, originals[name].weight.double()) for name, layer in layers.items())


def test_an_adapter_added_while_merged_sees_the_frozen_base(two: Two) -> None:
    """Slot E gives the merged layer a bias; the layer that D would scale still has none."""
    from glora_llm.glora import GLoRAConfig

    model = two("glora")
    model.merge_adapter()
    layer = next(iter(glora_layers(model).values()))
    assert layer.base_layer.bias is not None and layer.b0 is None
    model.unmerge_adapter()
    model.add_adapter(
        "c", GLoRAConfig(target_modules=["q_proj"], slots={"D": "vector", "E": "vector"}, d_without_bias="none")
    )
    assert "c" not in next(iter(glora_layers(model).values())).slot_D


def broken(model: Any) -> Any:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other" in name and "layers.1" in name:
                parameter.fill_(float("nan"))
    model.set_adapter("other")
    found = said(lambda: model.merge_adapter(safe_merge=True))
    weights = {name: value for name, value in model.state_dict().items() if name.endswith("base_layer.weight")}
    last = [name for name in weights if "layers.1" in name]
    assert last and all(torch.equal(weights[name], before[name]) for name in last)
    return found


def test_safe_merge_refuses_in_the_words_of_lora(two: Two) -> None:
    assert broken(two("glora")) == broken(two("lora"))


def test_a_safe_merge_on_top_that_fails_keeps_the_first(two: Two) -> None:
    model = two("glora")
    model.merge_adapter(["first"])
    merged = logits(model)
    with torch.no_grad():
        for layer in glora_layers(model).values():
            layer.slot_E["other"].vector.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter other seems to be broken"):
        model.merge_adapter(["other"], safe_merge=True)
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    assert not any(layer.merged for layer in glora_layers(model).values())
