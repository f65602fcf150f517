"""Tiny random models of the families in which methods of our own find their places, with a batch for each."""

from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 64,
}
FAMILIES = ("llama", "gemma", "gpt2", "opt", "neox", "bert", "vit")


def tiny_model(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """Return a model in eval mode whose every value is random: norms and biases too."""
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    made: dict[str, Any] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **special)),
        "gemma": lambda: GemmaForCausalLM(
            GemmaConfig(**SIZES, **special, num_key_value_heads=1, head_dim=16, tie_word_embeddings=False)
        ),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, **special)),
        "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, **special, ffn_dim=64, word_embed_proj_dim=32)),
        "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, **special)),
        "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)),
        "vit": lambda: ViTForImageClassification(
            ViTConfig(
                **{k: v for k, v in SIZES.items() if k != "vocab_size"}, image_size=16, patch_size=8, num_labels=3
            )
        ),
    }
    model = made[family]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval()


def batch(family: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Return two samples for a model of a family."""
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)}
    return {"input_ids": torch.arange(16).reshape(2, 8) + 3}


def require_learning(model: Any, naive: Any, family: str) -> None:
    """Require that a model learns, and that each step is that of the formula written out.

    Args:
        naive: returns a fresh base that computes with the trained parameters of `model` by the formula.
    """
    given = batch(family)
    labels = given.get("input_ids", torch.tensor([0, 1]))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.02)
    losses = []
    for _ in range(8):
        loss, expected = (one(**given, labels=labels).loss for one in (model, naive()))
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
        wanted = torch.autograd.grad(expected, list(trained.values()))
        optimizer.zero_grad()
        loss.backward()
        for (name, parameter), gradient in zip(trained.items(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-10, msg=name)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, losses


def perturb(model: torch.nn.Module, by: float = 0.1) -> None:
    """Move every trained parameter by a seeded random value, so that none is at its start."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(by * torch.randn(parameter.shape, generator=generator).to(parameter))
