"""The recipe's adapter section: its config, what is injected, what is trained at which rate, and what is saved."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from glora_llm.adapters.config import adapter_config
from glora_llm.adapters.inject import adapted_with_bias, inject, tuner_layers
from glora_llm.adapters.weights import save_adapter, trainables
from glora_llm.errors import UserError
from glora_llm.glora import GLoRAConfig, GLoRALinear
from glora_llm.glora.learning_rates import DEFAULT_LR_FACTORS
from glora_llm.models.load import meta_model
from glora_llm.models.resolve import ResolvedModel
from glora_llm.schema import AdapterSection, ModelSection
from glora_llm.schema.slots import PRESETS

IDS = torch.tensor([[1, 5, 9, 13, 17, 21], [2, 6, 10, 14, 18, 22]])


def llama(**keys: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32, "num_hidden_layers": 2} | keys
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def section(**keys: Any) -> AdapterSection:
    return AdapterSection.model_validate({"rank": 2, "alpha": 4.0, **keys})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def make_trained(model: nn.Module) -> dict[str, Tensor]:
    """Give what is trained seeded values; return them as the engine's state does."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
                state[f"master/{name}"] = parameter.detach().clone()
    assert state
    return state


def test_glora_takes_everything_from_the_section() -> None:
    given = section(
        slots={"A": {"mode": "lora", "rank": 4}, "E": "vector"},
        paths={"v_proj": {"B": {"mode": "lora", "alpha": 1.0}}},
        targets=["q_proj", "v_proj"],
        rank_stabilized=True,
        composition="hadamard",
        dropout=0.25,
        modules_to_save=["lm_head"],
    )
    config = adapter_config(given, seed=7, steps=20)
    assert isinstance(config, GLoRAConfig) and config.task_type == "CAUSAL_LM"
    assert config.slots == {"A": {"mode": "lora", "rank": 4}, "E": "vector"}
    assert config.paths == {"v_proj": {"B": {"mode": "lora", "alpha": 1.0}}}
    assert set(config.target_modules or ()) == {"q_proj", "v_proj"} and config.modules_to_save == ["lm_head"]
    assert (config.rank, config.alpha, config.rank_stabilized, config.dropout) == (2, 4.0, True, 0.25)
    assert (config.composition, config.seed, config.d_without_bias) == ("hadamard", 7, "error")


def test_the_default_is_the_paper_s_path_without_d() -> None:
    config = adapter_config(AdapterSection(), seed=0, steps=20)
    active = {slot: mode for slot, mode in config.slots.items() if mode != "none"}
    assert active == {"A": "lora", "B": "lora", "C": "vector", "E": "vector"}
    assert (config.target_modules, config.composition, config.rank, config.alpha) == ("all-linear", "product", 8, 16.0)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_its_slots(name: str) -> None:
    given = section(preset=name, composition="hadamard" if name == "repadapter" else "product")
    assert adapter_config(given, seed=0, steps=20).composition == {"hira": "hadamard"}.get(name, "product")
    wide = {"hidden_size": 128, "intermediate_size": 128} if name == "lossless4" else {}  # two blocks of 64 in a row
    base = llama(attention_bias=True, **wide)
    expected = logits(base)
    model = inject(base, given, seed=0, steps=20)
    assert torch.equal(logits(model), expected)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, GLoRALinear)}
    assert len(layers) == 14
    for path, layer in layers.items():
        active = {slot for slot in "ABCDE" if len(getattr(layer, f"slot_{slot}"))}
        bias_free = "mlp" in path
        assert active == set(PRESETS[name]) - ({"D"} if bias_free else set())


def test_slots_that_ask_for_d_without_a_bias_are_an_error() -> None:
    with pytest.raises(UserError, match="Slot D scales the frozen bias b0, and this layer has none"):
        inject(llama(), section(slots=PRESETS["ssf"]), seed=0, steps=20)


def test_slots_none_everywhere_are_an_error() -> None:
    with pytest.raises(
        UserError, match=r"has no trainable parameter\. adapter\.slots replaces the default slots as a whole"
    ):
        inject(llama(), section(slots={"A": "none"}), seed=0, steps=20)


@pytest.mark.parametrize(
    ("method", "switches"),
    [("lora", {}), ("rslora", {"use_rslora": True}), ("dora", {"use_dora": True})],
)
def test_variants_of_lora(method: str, switches: dict[str, bool]) -> None:
    config = adapter_config(section(method=method, dropout=0.5, targets=["q_proj"]), seed=0, steps=20)
    assert type(config) is LoraConfig
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (2, 4.0, 0.5, {"q_proj"})
    assert {name: getattr(config, name) for name in ("use_rslora", "use_dora") if getattr(config, name)} == switches
    base = llama()
    expected = logits(base)
    torch.testing.assert_close(logits(inject(base, section(method=method), seed=0, steps=20).eval()), expected)


def test_rank_stabilised_lora_is_rslora() -> None:
    assert adapter_config(section(method="lora", rank_stabilized=True), seed=0, steps=20).use_rslora is True


def test_other_methods_of_peft() -> None:
    ia3 = adapter_config(section(method="ia3", targets=["k_proj"], peft={"feedforward_modules": []}), seed=0, steps=20)
    assert ia3.peft_type == "IA3" and ia3.target_modules == {"k_proj"}
    oft = section(method="oft", targets=["q_proj"], peft={"oft_block_size": 0})
    names = [item.name for item in trainables(inject(llama(), oft, seed=0, steps=20), oft, loraplus_ratio=1.0)]
    assert len(names) == 2 and all(".oft_R." in name for name in names)


def test_adalora_has_the_rank_and_steps_of_the_run() -> None:
    config = adapter_config(section(method="adalora", rank=4), seed=0, steps=200)
    assert isinstance(config, AdaLoraConfig)
    assert (config.target_r, config.init_r, config.total_step, config.deltaT) == (4, 6, 200, 2)
    assert 0 < config.tinit < 200 - config.tfinal < 200
    given = adapter_config(section(method="adalora", peft={"init_r": 9}), seed=0, steps=200)
    assert isinstance(given, AdaLoraConfig) and given.init_r == 9
    for steps in (1, 2, 9):
        assert adapter_config(section(method="adalora"), seed=0, steps=steps).total_step == steps


def test_what_peft_rejects_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"adapter\.method oft: .*oft_block_size"):
        inject(llama(), section(method="oft", peft={"oft_block_size": 32}), seed=0, steps=20)  # and r
    with pytest.raises(UserError, match="cpt does not train here: its prompt is the tokens of chosen examples"):
        inject(llama(), section(method="cpt", peft={"num_virtual_tokens": 2}), seed=0, steps=20)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"targets": ["q_proj", "v_prj"]}, r"adapter\.targets: 'v_prj' matches no module\. Did you mean 'v_proj'\?"),
        ({"targets": "v_prj"}, "match"),
        (
            {"modules_to_save": ["lm_hed"]},
            r"adapter\.modules_to_save: 'lm_hed' .* Did you mean 'lm_head'",
        ),
    ],
)
@pytest.mark.parametrize("method", ["glora", "lora"])
def test_each_name_must_be_of_the_model(method: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        inject(llama(), section(method=method, **keys), seed=0, steps=20)


def test_a_single_name_is_a_list_of_one() -> None:
    assert section(targets="q_proj").targets == ["q_proj"]
    assert section(targets=r".*\.q_proj").targets == r".*\.q_proj"
    assert len(tuner_layers(inject(llama(), section(targets="q_proj"), seed=0, steps=20))) == 2


@pytest.mark.parametrize("keys", [{"targets": "q_proj("}, {"paths": {"q_proj(": {"B": "lora"}}}])
def test_an_expression_must_compile(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"'q_proj\(' is no regular expression: missing \), unterminated subpattern"):
        section(**keys)


def test_a_pattern_that_matches_no_layer_is_named() -> None:
    given = section(paths={r"layers\.1\.": {"B": "lora"}, "query": {"A": "lora"}})
    with pytest.raises(
        UserError, match=r"adapter\.paths 'query' matches none of the 14 adapted layers, such as .*q_proj"
    ):
        inject(llama(), given, seed=0, steps=20)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "lorra"}, "adapter.method 'lorra' is unknown. Did you mean 'lora'?"),
        ({"method": "gloraa"}, "Did you mean 'glora'?"),
        (
            {"method": "lora", "peft": {"use_dorra": True}},
            "adapter.peft.use_dorra: LoraConfig has no such argument. Did you mean 'use_dora'?",
        ),
    ],
)
def test_what_is_unknown_is_named_with_the_nearest(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        adapter_config(section(**keys), seed=0, steps=20)


@pytest.mark.parametrize("method", ["glora", "lora"])
@pytest.mark.parametrize("targets", [["query"], r"model\.decoder\..*"])
def test_targets_that_match_nothing_list_what_there_is(targets: str | list[str], method: str) -> None:
    with pytest.raises(UserError) as caught:
        inject(llama(), section(method=method, targets=targets), seed=0, steps=20)
    assert f"adapter.targets {targets!r} match no module. Linears of this model: " in str(caught.value)
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj; or all-linear." in str(caught.value)


@pytest.mark.parametrize("method", ["glora", "lora", "dora"])
def test_the_seed_fixes_the_start(method: str) -> None:
    starts = []
    for seed in (0, 0, 1):
        model = inject(llama(), section(method=method), seed, steps=20)
        starts.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())
    assert not all(torch.equal(value, starts[2][name]) for name, value in starts[0].items())


def test_trainables_of_glora() -> None:
    given = section(lr_factors={"C": 0.3}, modules_to_save=["lm_head"])
    model = inject(llama(), given, seed=0, steps=20)
    items = trainables(model, given, loraplus_ratio=4.0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {item.name: item.parameter for item in items}.keys() == trained.keys()
    assert all(item.parameter is trained[item.name] for item in items)
    for item in items:
        if "slot_" not in item.name:
            assert "lm_head" in item.name and item.lr_factor == 1.0
            continue
        slot = item.name.partition("slot_")[2][0]
        expected = (DEFAULT_LR_FACTORS | {"C": 0.3})[slot] * (4.0 if item.name.endswith(".down") else 1.0)
        assert item.lr_factor == expected, item.name
    assert sum("slot_" not in item.name for item in items) == 1


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_trainables_of_lora(method: str) -> None:
    given = section(method=method, targets=["q_proj", "v_proj"])
    items = trainables(inject(llama(), given, seed=0, steps=20), given, loraplus_ratio=8.0)
    factors = {item.name: item.lr_factor for item in items}
    assert len(factors) == 2 * 2 * {"lora": 2, "dora": 3}[method]
    assert all(factor == (8.0 if "lora_B" in name else 1.0) for name, factor in factors.items())


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "glora", "slots": {"A": "lora", "B": "lora", "C": "lora", "E": "scalar"}},
        {"method": "glora", "composition": "hadamard", "modules_to_save": ["lm_head"]},
        {"method": "lora", "modules_to_save": ["lm_head"]},
        {"method": "dora"},
    ],
)
def test_what_is_saved_is_read_by_peft(keys: dict[str, Any], tmp_path: Path) -> None:
    model = inject(llama(), section(**keys), seed=0, steps=20).eval()
    state = make_trained(model)
    expected = logits(model)
    with torch.no_grad():  # what is written are the master weights, not what the model holds
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    adam = {name.replace("master/", "exp_avg/"): value + 1 for name, value in state.items()}
    save_adapter(model, state | adam, tmp_path / "adapter", "some/base")
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json"}
    again = PeftModel.from_pretrained(llama(), str(tmp_path / "adapter")).eval()
    assert again.peft_config["default"].base_model_name_or_path == "some/base"
    assert torch.equal(logits(again), expected)
    assert not torch.allclose(expected, logits(llama()), atol=1e-3)


def test_the_same_adapter_on_a_model_without_weights(tiny: ResolvedModel) -> None:
    meta = inject(meta_model(ModelSection(name_or_path="x"), tiny.folder), section(), seed=0, steps=20)
    counts = {name: p.shape for name, p in meta.named_parameters() if p.requires_grad}
    assert len(counts) == 2 * 7 * 6  # A and B with two factors, C, E
    assert sum(shape.numel() for shape in counts.values()) > 0


def test_layers_that_need_a_bias_are_found() -> None:
    given = section(slots={"A": "lora"}, paths={"q_proj": {"C": "vector"}, r"1\.mlp\.up": {"E": "scalar"}})
    found = adapted_with_bias(inject(llama(), given, seed=0, steps=20))
    assert sorted(found) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert adapted_with_bias(inject(llama(), section(method="lora"), seed=0, steps=20)) == []
