"""Small models of many families, by which the tests of attention are run."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from glora_llm.models import attention

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
WINDOW = 4  # shorter than most samples
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 24, "vocab_size": 48, "num_hidden_layers": 2, "use_cache": False,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
# Families that hand segments to their attention, those with windows among them.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "gpt_neox": {},
    "cohere2": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {"attention_multiplier": 0.7},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 32, "dropout": 0.0},
}
# Families whose attention is more than that, or which do not hand anything to it.
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {"attn_logit_softcapping": 30.0},
    "llama4_text": {"num_local_experts": 2, "attention_chunk_size": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},  # dropout inside of its attention
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt_oss": {"num_local_experts": 2},
}


def configuration(family: str) -> PretrainedConfig:
    return AutoConfig.for_model(family, **SMALL | (FAMILIES | OTHERS)[family])


def build(family: str, backend: str, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    attention.register()
    model = AutoModelForCausalLM.from_config(configuration(family), attn_implementation=backend, dtype=dtype)
    return model.to(device).eval()
