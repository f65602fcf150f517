"""One tiny model of each family that adapters of blocks go into."""

from typing import Any

import torch
from torch import Tensor

FAMILIES = ("llama", "gpt2", "bert", "vit")
IDS = torch.arange(24).reshape(2, 12)


def tiny(family: str) -> Any:
    """Return a model of two blocks, 32 wide, with random weights."""
    import transformers as hf

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    if family == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=32, **sizes))
    if family == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=2, n_positions=16))
    if family == "bert":
        config = hf.BertConfig(vocab_size=32, num_labels=3, max_position_embeddings=16, **sizes)
        return hf.BertForSequenceClassification(config)
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=16, patch_size=8, num_labels=3, **sizes))


def inputs_of(family: str) -> dict[str, Tensor]:
    """Return a batch of two for a model of `tiny`, in float64 where it is of pixels."""
    if family != "vit":
        return {"input_ids": IDS}
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}
