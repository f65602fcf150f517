"""A GLoRA adapter as a plain LoRA: the same weight and bias by the formula, the same logits through PEFT."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from glora_llm.adapters.config import FACTOR_METHODS
from glora_llm.errors import UserError
from glora_llm.glora import GLoRAConfig, GLoRALinear
from glora_llm.glora.linear import effective
from glora_llm.merge.lora_export import as_lora, write_lora
from glora_llm.models.load import load_base
from tests.glora.paths import all_paths
from tests.merge.conftest import ALL_MODES, CPU, Train, Trained, logits

I, O = 7, 5  # noqa: E741 - the letters of the formula


@pytest.mark.parametrize(("bias", "count"), [(True, 2 * 4 * 3 * 3 * 3), (False, 2 * 4 * 3 * 3)])
def test_every_path_with_a_lora_form_is_the_formula(bias: bool, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(I, O, bias=bias, dtype=torch.float64).requires_grad_(False)
    with_form = [path for path in all_paths(2, 1.5, bias) if path["A"].mode in ("lora", "none")]
    assert len(with_form) == count
    for path in with_form:
        layer = GLoRALinear(base)
        layer.update_layer("default", GLoRAConfig(), path)
        with torch.no_grad():
            for name, value in layer.named_parameters():
                if "slot_" in name:
                    value.normal_(generator=generator)
        slots = layer.slots("default")
        up, down, own_bias = as_lora(base.weight, base.bias, slots)
        weight, full_bias = effective(base.weight, base.bias, slots, "product")
        ranks = [path[slot].rank for slot in "AB" if path[slot].mode == "lora"]
        ranks += [1] * (path["B"].mode in ("vector", "scalar"))
        assert up.shape == (max(1, sum(ranks)), I) and down.shape == (O, max(1, sum(ranks)))
        torch.testing.assert_close(base.weight + down @ up, weight)
        assert (own_bias is not None) == (path.touches_bias() or path["D"].mode != "none")
        shift = torch.zeros(O, dtype=torch.float64) if full_bias is None else full_bias - (base.bias if bias else 0)
        torch.testing.assert_close(torch.zeros_like(shift) if own_bias is None else own_bias, shift)


def export(trained: Trained, out: Path) -> Path:
    write_lora(trained.plan, trained.folder.adapter, out, trained.dtype)
    assert not list(out.parent.glob(".writing-*"))
    return out


def through_peft(trained: Trained, lora: Path) -> Tensor:
    base = load_base(trained.plan.recipe.model, trained.plan.base.folder, CPU)
    return logits(PeftModel.from_pretrained(base, str(lora)).eval())


MIXED: dict[str, Any] = {
    "slots": {"A": "lora", "B": {"mode": "lora", "rank": 3}},
    "paths": {
        r"layers\.1\.": {"B": {"mode": "lora", "rank": 4}, "E": "scalar"},
        "up_proj": {"A": "lora", "C": "lora"},
        "o_proj": {"E": "vector"},
    },
}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    "adapter",
    [
        {"slots": ALL_MODES},
        {"slots": {"A": "lora", "B": "lora"}, "rank_stabilized": True},
        {"preset": "repadapter", "targets": ["q_proj", "down_proj"]},
        {"preset": "bitfit"},
        {"slots": {"A": "lora", "B": "vector"}, "paths": {"v_proj": {"B": "scalar", "E": "vector"}}},
        MIXED,
    ],
)
def test_peft_reads_what_was_exported(adapter: dict[str, Any], quantization: str, train: Train, tmp_path: Path) -> None:
    trained = train(**adapter, model={"quantization": quantization})
    expected = trained.logits()
    found = through_peft(trained, export(trained, tmp_path / "lora"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    base = load_base(trained.plan.recipe.model, trained.plan.base.folder, CPU)
    assert (expected - logits(base)).abs().max() > 0.02


def test_ranks_scale_and_targets(train: Train, tmp_path: Path) -> None:
    out = export(train(**MIXED), tmp_path / "lora")
    assert {file.name for file in out.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    config = LoraConfig.from_pretrained(str(out))
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    weights = load_file(out / "adapter_model.safetensors")
    assert len(config.target_modules or ()) == 14 and config.lora_bias is True
    for name in config.target_modules or ():
        rank = config.rank_pattern.get(name, config.r)
        assert config.alpha_pattern.get(name, config.lora_alpha) == rank  # scale 1
        assert weights[f"base_model.model.{name}.lora_A.weight"].shape[0] == rank
        expected = {"o_proj": 1, "up_proj": 2}.get(name.rpartition(".")[2], 4 if "layers.1." in name else 5)
        assert rank == expected, name
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_without_c_and_e_there_is_no_bias(train: Train, tmp_path: Path) -> None:
    out = export(train(slots={"B": "lora"}), tmp_path / "lora")
    assert LoraConfig.from_pretrained(str(out)).lora_bias is False
    assert not any(name.endswith(".bias") for name in load_file(out / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("adapter", "layers", "first"),
    [
        ({"slots": {"A": "vector", "B": "lora"}}, 14, r"model\.layers\.0\.self_attn\.q_proj"),
        ({"slots": {"B": "lora"}, "paths": {r"1\.mlp\.up": {"A": "scalar"}}}, 1, r"model\.layers\.1\.mlp\.up_proj"),
        (
            {"slots": {"A": "lora"}, "composition": "hadamard", "targets": ["v_proj"]},
            2,
            r"layers\.0\.self_attn\.v_proj",
        ),
    ],
)
def test_a_path_without_a_lora_form_names_the_layers(
    adapter: dict[str, Any], layers: int, first: str, train: Train, tmp_path: Path
) -> None:
    trained = train(**adapter)
    with pytest.raises(
        UserError, match=rf"{layers} layers have no plain LoRA form .*, the first: .*{first}.* Merge them"
    ):
        export(trained, tmp_path / "lora")
    assert not list(tmp_path.iterdir())


def test_hadamard_without_a_has_a_lora_form(train: Train, tmp_path: Path) -> None:
    trained = train(slots={"B": "lora", "E": "vector"}, composition="hadamard")
    found = through_peft(trained, export(trained, tmp_path / "lora"))
    torch.testing.assert_close(found, trained.logits(), rtol=1e-4, atol=2e-4)


def test_a_module_saved_in_full_goes_along(train: Train, tmp_path: Path) -> None:
    trained = train(slots={"B": "lora"}, modules_to_save=["lm_head"])
    found = through_peft(trained, export(trained, tmp_path / "lora"))
    torch.testing.assert_close(found, trained.logits(), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("method", FACTOR_METHODS)
def test_sums_of_products_are_written_too(train: Train, tmp_path: Path, method: str) -> None:
    trained = train(method=method)
    found = through_peft(trained, export(trained, tmp_path / "lora"))
    torch.testing.assert_close(found, trained.logits(), rtol=1e-4, atol=2e-4)
    config = LoraConfig.from_pretrained(str(tmp_path / "lora"))
    assert config.r == {"lors": 4}.get(method, 2) and config.peft_type == "LORA"


def test_another_method_is_refused(train: Train, tmp_path: Path) -> None:
    trained = train(method="lora")
    with pytest.raises(UserError, match=r"exports adapters of glora.*; this one is lora "):
        export(trained, tmp_path / "lora")


def test_an_existing_folder_is_left_alone(train: Train, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        export(train(slots={"B": "lora"}), tmp_path)
    assert not list(tmp_path.iterdir())
