"""Tiny random models under the names that PEFT's tests ask the hub for, as folders of those names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = {"vocab_size": 128, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = SIZES | WORDS | {"max_position_embeddings": 64}


def _llama(**keys: Any) -> Any:
    return hf.LlamaConfig(**SIZES, **WORDS, num_key_value_heads=2, max_position_embeddings=64, **keys)


def _opt() -> Any:
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "init_std": 0.2}
    words = {key: value for key, value in WORDS.items() if key != "initializer_range"}
    return hf.OPTConfig(**sizes, **words, word_embed_proj_dim=32, max_position_embeddings=64)


def _bart() -> Any:
    layers = {
        f"{part}_{what}": n
        for part in ("encoder", "decoder")
        for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    }
    words = {"vocab_size": 128, "init_std": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return hf.BartConfig(d_model=32, max_position_embeddings=64, decoder_start_token_id=2, **layers, **words)


def _t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
    return hf.T5Config(**sizes, decoder_start_token_id=0, initializer_factor=2.0)


def _gemma3() -> Any:
    sizes = SIZES | {"head_dim": 8, "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": 16}
    # small embeddings: tied to the output, large ones repeat the last token whatever an adapter does
    return hf.Gemma3TextConfig(**sizes, **(WORDS | {"initializer_range": 0.02}))


def _qwen2() -> Any:
    return hf.Qwen2Config(**SIZES, **WORDS, num_key_value_heads=2, max_position_embeddings=64)


# name on the hub -> class of the model, its configuration
MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", _opt),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", lambda: hf.GPT2Config(**GPT)),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        lambda: hf.GPTJConfig(**GPT, rotary_dim=4, initializer_range=0.2),
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _llama),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", _qwen2),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", _gemma3),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", _t5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", _bart),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", lambda: hf.BertConfig(**BERT)),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", lambda: hf.RobertaConfig(**BERT)),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", lambda: hf.DebertaConfig(**BERT)),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", lambda: hf.DebertaV2Config(**BERT)),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        lambda: hf.BertConfig(**BERT),
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        lambda: hf.RobertaConfig(**BERT),
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", _llama),
}
# an adapter of the hub, of which a test reads the configuration alone
ADAPTERS = {"peft-internal-testing/tiny-opt-lora-revision": {"base_model_name_or_path": "x", "task_type": "CAUSAL_LM"}}


def build(folder: Path) -> None:
    """Write every model that is not there yet as FOLDER/NAME, with seeded weights."""
    for name, (kind, make) in MODELS.items():
        if not (folder / name / "config.json").is_file():
            torch.manual_seed(0)
            getattr(hf, kind)(make()).save_pretrained(folder / name)
    for name, content in ADAPTERS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
