"""merge_and_unload with every family of causal language models that the installed transformers builds small."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.falcon.modeling_falcon import FalconLinear

from glora_llm.glora import GLoRAConfig
from tests.glora.conftest import Fill

SLOTS = {"A": "lora", "B": "lora", "C": "vector", "E": "vector"}
# A family takes those of these keys that its configuration has.
SIZES: dict[str, int] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"], 48),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 16),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "encoder_layers", "n_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads"], 4),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "rotary_dim"], 4),
    **dict.fromkeys(["vocab_size", "max_position_embeddings", "n_positions"], 64),
    **{"num_key_value_heads": 2, "num_experts_per_tok": 2, "head_dim": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
LARGEST = 3_000_000  # numbers; a family of more has sizes that SIZES does not reach
IDS = torch.arange(3, 9)[None]
BIAS_WARNING = "The merged model has biases"


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def small(family: str, **others: int) -> PreTrainedModel | None:
    """Build a family at SIZES, but for `others`, with random weights and biases; None where they do not fit it."""
    try:
        keys = AutoConfig.for_model(family).to_dict()
        config = AutoConfig.for_model(family, **{key: size for key, size in (SIZES | others).items() if key in keys})
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        if sum(value.numel() for value in empty.parameters()) > LARGEST:
            return None
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.05 * torch.randn_like(value))
        logits(model)
    except Exception:  # noqa: BLE001 - a family may refuse sizes by any error, and is then left out
        return None
    return model


def adapted(model: Any, fill: Fill, slots: dict[str, str], head: bool = False) -> Any:
    """Adapt every linear that returns one tensor (and the output head, with `head`); None where there is none."""
    output = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, FalconLinear) and (head or module is not output)
    ]
    if not names:
        return None
    wrapped = get_peft_model(model, GLoRAConfig(target_modules=names, slots=slots, rank=2, seed=0)).eval()
    fill(wrapped)
    return wrapped


def merge_and_reload(wrapped: Any, folder: Path) -> tuple[Any, set[str], list[str]]:
    """Return the model that plain transformers loads, the merged tensors that it does not know, and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        merged = wrapped.merge_and_unload()
    merged.save_pretrained(folder)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    messages = [str(warning.message) for warning in said if BIAS_WARNING in str(warning.message)]
    return model.eval(), set(report["unexpected_keys"]), messages


# family -> whether plain transformers can hold what C and E make of all of its linears
KNOWN = {
    **dict.fromkeys(["llama", "opt", "falcon", "phi", "gpt_neox", "starcoder2", "bloom"], True),
    **dict.fromkeys(["qwen2", "glm", "mistral", "gemma2", "gptj", "mpt"], False),
}
OTHERS = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(KNOWN))


def holds(family: str, fill: Fill, folder: Path) -> bool | None:
    """Check one family; return whether it holds the biases, None where it is left out."""
    model = small(family)
    wrapped = None if model is None else adapted(model, fill, SLOTS)
    if wrapped is None:
        return None
    expected = logits(wrapped)
    again, lost, messages = merge_and_reload(wrapped, folder)
    if messages:
        assert len(messages) == 1 and lost and all(name.endswith(".bias") for name in lost)
        assert f"biases in {len(lost)} linears, where a {again.config.model_type} model" in messages[0]
        assert sorted(lost)[0].removesuffix(".bias") in messages[0]
        return False
    assert not lost
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    return True


@pytest.mark.parametrize("family", KNOWN)
def test_merged_is_reloaded_or_its_biases_are_named(family: str, fill: Fill, tmp_path: Path) -> None:
    assert holds(family, fill, tmp_path) is KNOWN[family]


@pytest.mark.slow
def test_no_family_loses_a_bias_in_silence(fill: Fill, tmp_path: Path) -> None:
    found = {family: holds(family, fill, tmp_path / family) for family in OTHERS}
    assert list(found.values()).count(True) > 40 and list(found.values()).count(False) > 40


@pytest.mark.parametrize("family", KNOWN)
def test_a_and_b_alone_are_reloaded_everywhere(family: str, fill: Fill, tmp_path: Path) -> None:
    """The output head too, which a tied family then no longer shares with its embedding."""
    model = small(family)
    assert model is not None
    wrapped = adapted(model, fill, {"A": "lora", "B": "lora"}, head=True)
    expected = logits(wrapped)
    again, lost, messages = merge_and_reload(wrapped, tmp_path)
    assert not lost and not messages
    assert json.loads((tmp_path / "config.json").read_text()).get("tie_word_embeddings", False) is False
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "held"), [("llama", False), ("phi", True)])
def test_a_bias_on_the_head_is_held_or_named(family: str, held: bool, fill: Fill, tmp_path: Path) -> None:
    model = small(family)
    assert model is not None
    wrapped = adapted(model, fill, SLOTS, head=True)
    expected = logits(wrapped)
    again, lost, messages = merge_and_reload(wrapped, tmp_path)
    assert bool(messages) is not held and lost == (set() if held else {"lm_head.bias"})
    assert held or "1 linears, where a llama model of plain transformers has none: lm_head." in messages[0]
    if held:
        torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
