"""A trained B as the start of a supernet: the largest path is what was trained, and what does not fit is named."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from glora_llm.adapters.even import even_scales, set_scales
from glora_llm.adapters.inject import adapted_layers
from glora_llm.adapters.supernet_start import begins_with_b, check_b, load_b
from glora_llm.errors import UserError
from glora_llm.glora import GLoRAConfig
from glora_llm.glora.path import LayerPath, SlotSpec

TARGETS = ["q_proj", "down_proj"]
IDS = torch.tensor([[1, 5, 9, 13], [2, 6, 10, 14]])
DOWN = "model.layers.0.mlp.down_proj"


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def trained(folder: Path, config: Any, scaled: bool = False) -> torch.Tensor:
    """Save an adapter that looks trained; return its logits."""
    model = get_peft_model(llama(), config).eval()
    if scaled:
        set_scales(model, even_scales(model))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
        model.save_pretrained(str(folder))
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def lora(**keys: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **keys})


def supernet(ranks: list[int], scaling: str = "alpha", **keys: Any) -> Any:
    config = GLoRAConfig(target_modules=TARGETS, supernet={"ranks": ranks, **keys}, scaling=scaling, seed=0)
    model = get_peft_model(llama(), config).eval()
    if scaling == "even":
        set_scales(model, even_scales(model))
    return model


@pytest.mark.parametrize(
    ("scaling", "ranks", "start"),
    [
        ("alpha", [8, 4, 2], lora()),
        ("alpha", [4], lora(use_rslora=True)),
        ("even", [4, 2], lora()),
        ("even", [4, 2], GLoRAConfig(target_modules=TARGETS, slots={"B": "lora"}, rank=4, alpha=6, scaling="even")),
        ("alpha", [4, 2], GLoRAConfig(target_modules=["q_proj"], slots={"B": "lora"}, rank=4, rank_stabilized=True)),
    ],
    ids=["larger", "rslora", "even", "even GLoRA", "fewer targets"],
)
def test_the_largest_path_is_what_was_trained(scaling: str, ranks: list[int], start: Any, tmp_path: Path) -> None:
    expected = trained(tmp_path, start, getattr(start, "scaling", "") == "even")
    model = supernet(ranks, scaling)
    assert begins_with_b(model.peft_config["default"], tmp_path)
    load_b(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, llama()(input_ids=IDS).logits, atol=1e-2)


def test_ranks_at_one_scale_are_the_best_approximations(tmp_path: Path) -> None:
    trained(tmp_path, lora())
    model = supernet([8, 4, 2])
    layer: Any = adapted_layers(model)[DOWN]
    before: Any = adapted_layers(supernet([8, 4, 2]))[DOWN]
    load_b(model, tmp_path)

    def change(rank: int) -> torch.Tensor:
        layer.path["default"] = LayerPath((("B", SlotSpec("lora", rank, 2.0)),))
        found: torch.Tensor = layer.merged_weight(["default"])[0] - layer.get_base_layer().weight
        return found

    best = torch.linalg.svd(change(8))
    for rank in (4, 2):
        wanted = best.U[:, :rank] * best.S[:rank] @ best.Vh[:rank]
        torch.testing.assert_close(change(rank), wanted, rtol=1e-3, atol=1e-5)
    up, own = (each.slot_B["default"].up.detach() for each in (layer, before))
    assert torch.equal(up[4:], own[4:]) and float(up[:4].norm() / own[:4].norm()) == pytest.approx(1, rel=0.3)


def test_another_supernet_is_no_b(tmp_path: Path) -> None:
    model = supernet([4, 2])
    model.save_pretrained(str(tmp_path))
    assert not begins_with_b(model.peft_config["default"], tmp_path)
    assert not begins_with_b(lora(), tmp_path)


@pytest.mark.parametrize(
    ("start", "model", "said"),
    [
        (GLoRAConfig(target_modules=TARGETS, slots={"A": "lora", "B": "lora"}), {},
         "slot_A.down, and a supernet begins with slot B alone: with LoRA, or GLoRA of adapter.slots={B: lora}"),
        (lora(), {"ranks": [2]}, "has rank 4, and the largest of this supernet is 2: set adapter.supernet.ranks so"),
        (lora(), {"ranks": [8], "scaling": "even"}, "is 8, whose ranks share columns in adapter.scaling even: set "),
        (lora(), {"modes": {"B": ["vector"]}}, "slot B, which has no mode lora here: add it to adapter.supernet.modes"),
        (lora(target_modules=["q_proj", "up_proj"]), {}, "model.layers.0.mlp.up_proj, which is none of the 2 layers"),
        (lora(rank_pattern={"q_proj": 2}), {}, "has rank_pattern, and slot B of a supernet has nothing like it"),
        (lora(alora_invocation_tokens=[1], task_type="CAUSAL_LM"), {},
         "has alora_invocation_tokens, and slot B of a supernet has nothing like it"),
        (lora(modules_to_save=["lm_head"]), {}, "lm_head.weight, and a supernet begins with slot B alone"),
    ],
    ids=["slots", "rank", "even rank", "no mode", "targets", "pattern", "activated", "head"],
)  # fmt: skip
def test_what_does_not_fit_is_named(start: Any, model: dict[str, Any], said: str, tmp_path: Path) -> None:
    trained(tmp_path, start)
    with pytest.raises(UserError, match=re.escape(said)):
        check_b(supernet(**{"ranks": [4, 2], **model}), tmp_path)


def test_a_damaged_file_is_one_message(tmp_path: Path) -> None:
    trained(tmp_path, lora())
    (tmp_path / "adapter_model.safetensors").write_text("nothing")
    with pytest.raises(UserError, match="is no safetensors file"):
        check_b(supernet([4, 2]), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
