"""LLaMA shapes with random weights in nf4, made linear by linear on the device: no file, no download."""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES: dict[str, dict[str, int]] = {
    "LLaMA-2-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
                   "num_key_value_heads": 32, "vocab_size": 32000, "num_hidden_layers": 32},
    "Llama-3-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "vocab_size": 128256, "num_hidden_layers": 32},
    "rehearsal": {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "vocab_size": 512, "num_hidden_layers": 2},
}  # fmt: skip
SPREAD = 0.02  # standard deviation of every weight


def config_of(shape: str) -> LlamaConfig:
    """Return the configuration of a shape."""
    return LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, use_cache=False)


def random_nf4_model(shape: str, device: torch.device, dtype: torch.dtype, attn_implementation: str = "sdpa") -> Any:
    """Return a frozen model in nf4, head and embeddings in `dtype`, with activation checkpointing."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    config = config_of(shape)
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            values = SPREAD * torch.randn(module.out_features, module.in_features, device=device, dtype=dtype)
            packed: Any = Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_storage=dtype,
                device="meta",
            )  # fmt: skip
            packed.weight = Params4bit(values, requires_grad=False, quant_type="nf4", quant_storage=dtype).to(device)
            model.model.set_submodule(name, packed)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                norm = parameter.dim() == 1
                made = torch.ones if norm else torch.randn
                drawn = made(parameter.shape, device=device, dtype=dtype)
                module._parameters[name] = nn.Parameter(drawn if norm else SPREAD * drawn)
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True  # PEFT chooses its layers by it
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model
