"""GLoRA as PEFT sees it: injection, configuration, saving, several adapters, mixed batches."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from glora_llm.errors import UserError
from glora_llm.glora import GLoRAConfig
from tests.glora.conftest import ALL_MODES, IDS, Fill, Llama, glora, glora_layers, logits, slot_values

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("composition", ["product", "hadamard"])
@pytest.mark.parametrize(
    "slots",
    [
        {"A": "lora", "B": "lora", "C": "vector", "E": "vector"},
        {"A": "vector", "B": "vector", "C": "lora", "E": "scalar"},
        {"A": "scalar", "B": "scalar"},
    ],
)
def test_the_start_changes_nothing(slots: dict[str, str], composition: str, llama: Llama) -> None:
    expected = logits(llama())
    model = glora(llama(), slots=slots, composition=composition)
    assert len(glora_layers(model)) == 2 * 7
    assert torch.equal(logits(model), expected)


def test_only_slots_are_trained(llama: Llama) -> None:
    model = glora(llama(), slots=ALL_MODES)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == set(slot_values(model)) and len(trained) == 2 * 7 * 7
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all((value.grad is not None) == (name in trained) for name, value in model.named_parameters())
    assert {name.rpartition(".")[2] for name in trained} == {"down", "up", "vector"}


def test_all_linear_leaves_the_head_alone(llama: Llama) -> None:
    model = glora(llama())
    assert {name.rpartition(".")[2] for name in glora_layers(model)} == LINEARS
    assert type(model.get_base_model().lm_head) is nn.Linear


@pytest.mark.parametrize("composition", ["product", "hadamard"])
def test_saving_and_loading_is_exact(composition: str, llama: Llama, fill: Fill, tmp_path: Path) -> None:
    paths = {r"layers\.1\.": {"A": {"mode": "lora", "rank": 3, "alpha": 5.0}, "E": "scalar"}}
    model = glora(llama(), slots=ALL_MODES, paths=paths, composition=composition, alpha=3.0, rank_stabilized=True)
    fill(model)
    expected = logits(model)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    assert torch.equal(logits(again), expected)
    assert not torch.allclose(expected, logits(llama()), atol=1e-3)
    before, after = (m.peft_config["default"] for m in (model, again))
    for name in ("slots", "paths", "rank", "alpha", "rank_stabilized", "composition", "target_modules", "seed"):
        assert getattr(after, name) == getattr(before, name), name
    assert not any(value.requires_grad for value in again.parameters())
    trainable = PeftModel.from_pretrained(llama(), str(tmp_path), is_trainable=True)
    assert {name for name, value in trainable.named_parameters() if value.requires_grad} == set(slot_values(model))


def test_several_adapters(llama: Llama, fill: Fill) -> None:
    base = logits(llama())
    model = glora(llama(), slots=ALL_MODES)
    model.add_adapter("other", GLoRAConfig(rank=3, slots={"A": "vector", "B": "lora", "E": "scalar"}, seed=1))
    fill(model, seed=1, adapter="default")
    fill(model, seed=2, adapter="other")
    first = logits(model)
    model.set_adapter("other")
    second = logits(model)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained and all(".other." in name for name in trained)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert min(float((one - two).abs().max()) for one, two in ((first, base), (second, base), (both, first))) > 1e-3
    model.delete_adapter("other")
    assert not any("other" in name for name in slot_values(model))
    assert all("other" not in layer.path for layer in glora_layers(model).values())
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_disabled_it_is_the_base(llama: Llama, fill: Fill) -> None:
    base = logits(llama())
    model = glora(llama(), slots=ALL_MODES)
    fill(model)
    expected = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected) and not torch.equal(expected, base)


def test_a_batch_of_several_adapters(llama: Llama, fill: Fill) -> None:
    model = glora(llama(), slots=ALL_MODES)
    model.add_adapter("other", GLoRAConfig(rank=2, slots={"A": "vector", "E": "vector"}))
    fill(model)
    expected = [logits(model)[0]]
    model.set_adapter("other")
    expected.append(logits(model)[1])
    with model.disable_adapter():
        expected.append(logits(model)[2])
    for active in ("default", "other"):
        model.set_adapter(active)
        mixed = logits(model, adapter_names=["default", "other", "__base__"])
        torch.testing.assert_close(mixed, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_a_batch_of_an_unknown_adapter(llama: Llama) -> None:
    model = glora(llama())
    with pytest.raises(ValueError, match="nobody"):
        logits(model, adapter_names=["default", "nobody", "__base__"])


def test_one_layer_takes_a_mixed_batch(fill: Fill) -> None:
    model = glora(nn.Sequential(nn.Linear(7, 5)), target_modules=["0"], slots=ALL_MODES)
    model.add_adapter("other", GLoRAConfig(target_modules=["0"], slots={"A": "vector"}))
    fill(model)
    layer: Any = model.get_base_model()[0]
    x = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mixed = layer(x, adapter_names=["other", "default", "__base__", "other"])
        assert torch.equal(mixed[2], layer.get_base_layer()(x)[2])
        for name, places in (("default", [1]), ("other", [0, 3])):
            model.base_model.set_adapter(name)
            torch.testing.assert_close(mixed[places], layer(x[places]))
    with pytest.raises(ValueError, match=r"Length of `adapter_names` should be .* got 2 and 4"):
        layer(x, adapter_names=["default", "default"])


@pytest.mark.parametrize("slots", [{"D": "vector"}, {"B": "lora", "D": "scalar"}])
def test_d_without_a_bias_says_why(slots: dict[str, str], llama: Llama) -> None:
    said = r"q_proj: Slot D scales the frozen bias b0, and this layer has none, .*Set D to none, or give it by `paths`"
    with pytest.raises(UserError, match=said):
        glora(llama(), target_modules=["q_proj"], slots=slots)


def test_d_by_path_for_the_layers_that_have_a_bias(llama: Llama) -> None:
    paths = {r"self_attn\.": {"D": "vector", "E": "vector"}}
    layers = glora_layers(glora(llama(attention_bias=True), slots={"E": "vector"}, paths=paths))
    with_d = {name.rpartition(".")[2] for name, layer in layers.items() if len(layer.slot_D)}
    assert with_d == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_d_can_be_left_out_where_there_is_no_bias(llama: Llama) -> None:
    slots = {"D": "vector", "E": "vector"}
    layers = glora_layers(glora(llama(attention_bias=True), slots=slots, d_without_bias="none"))
    for name, layer in layers.items():
        assert (len(layer.slot_D) == 1) == ("self_attn" in name) and len(layer.slot_E) == 1


@pytest.mark.parametrize(("targets", "kind"), [(["rotary_emb"], "LlamaRotaryEmbedding"), (["norm"], "LlamaRMSNorm")])
def test_other_modules_are_named(targets: list[str], kind: str, llama: Llama) -> None:
    with pytest.raises(UserError, match=rf"{targets[0]}' is a {kind}; GLoRA adapts nn\.Linear, transformers'"):
        glora(llama(), target_modules=targets)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"composition": "sum"}, "composition is 'sum'; expected product or hadamard."),
        (
            {"slots": {"A": "vectr"}},
            "Slot A has no mode 'vectr'; it has: lora, block, vector, scalar, none. Did you mean",
        ),
        ({"paths": {"q_proj": {"C": "scalar"}}}, "Slot C has no mode 'scalar'"),
    ],
)
def test_a_wrong_configuration_fails_at_once(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        GLoRAConfig(**keys)


def test_the_seed_fixes_the_start(llama: Llama) -> None:
    starts = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        base = llama()
        torch.manual_seed(noise)
        starts.append(slot_values(glora(base, seed=seed)))
    same = {name: torch.equal(value, starts[1][name]) for name, value in starts[0].items()}
    other = {name: torch.equal(value, starts[2][name]) for name, value in starts[0].items()}
    assert all(same.values())
    assert {name for name, equal in other.items() if not equal} == {name for name in other if name.endswith(".up")}
    ups = [value for name, value in starts[0].items() if name.endswith("up") and "q_proj" in name]
    assert len(ups) == 4 and not any(torch.equal(ups[0], up) for up in ups[1:])  # layers differ


def test_paths_by_pattern_and_ranks_by_slot(llama: Llama) -> None:
    slots = {"A": {"mode": "lora", "rank": 3, "alpha": 6.0}, "B": "lora"}
    paths = {r"layers\.1\.": {"B": {"mode": "lora", "rank": 4}}, "v_proj": {"A": "scalar", "E": "vector"}}
    layers = glora_layers(glora(llama(), rank=2, alpha=5.0, slots=slots, paths=paths))
    for name, layer in layers.items():
        active = {slot for slot in "ABCDE" if len(getattr(layer, f"slot_{slot}"))}
        if "v_proj" in name:
            assert active == {"A", "E"} and layer.slot_A["default"].scalar.shape == (1,)
        elif "layers.1." in name:
            assert active == {"B"} and layer.slot_B["default"].down.shape == (layer.out_features, 4)
            assert layer.path["default"]["B"].scale == 5.0 / 4
        else:
            a, b = layer.slot_A["default"], layer.slot_B["default"]
            assert a.down.shape == (layer.in_features, 3) and layer.path["default"]["A"].scale == 6.0 / 3
            assert b.up.shape == (2, layer.in_features) and layer.path["default"]["B"].scale == 5.0 / 2


def test_an_adapter_made_again_starts_the_same(llama: Llama) -> None:
    model = glora(llama(), seed=3)
    first = slot_values(model)
    model.delete_adapter("default")
    model.add_adapter("default", GLoRAConfig(rank=2, seed=3))
    assert all(torch.equal(value, first[name]) for name, value in slot_values(model).items())


@pytest.mark.parametrize("composition", ["product", "hadamard"])
def test_rank_stabilised_scaling(composition: str, llama: Llama, fill: Fill) -> None:
    """alpha / sqrt(4) of alpha 3 is alpha / 4 of alpha 6."""
    outputs = []
    for alpha, stabilised in ((3.0, True), (6.0, False)):
        model = glora(llama(), rank=4, alpha=alpha, rank_stabilized=stabilised, composition=composition)
        fill(model)
        outputs.append(logits(model))
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("composition", ["product", "hadamard"])
def test_bfloat16_autocast(composition: str, llama: Llama, fill: Fill) -> None:
    model = glora(llama(), slots=ALL_MODES, composition=composition)
    fill(model)
    expected = logits(model)
    layer = next(iter(glora_layers(model).values()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.zeros(1, 16)).dtype == torch.bfloat16
        out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if "slot_" in name}
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())
    assert (out.logits.float() - expected).abs().mean() < 0.05 * expected.std()
