"""LLaMA shapes with random weights in nf4, made linear by linear on the device: no file, no download."""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from glora_llm.models.random_llama import LLAMA2_7B, LLAMA3_8B, LlamaShape, llama_config

SHAPES = {
    "LLaMA-2-7B": LLAMA2_7B,
    "Llama-3-8B": LLAMA3_8B,
    "rehearsal": LlamaShape(2, 64, 176, 4, 2, 512, 8192, "float32", 0.02),
}
SPREAD = 0.02  # standard deviation of every weight


def config_of(shape: str) -> LlamaConfig:
    """Return the configuration of a shape."""
    config = llama_config(SHAPES[shape])
    config.use_cache = False
    return config


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
