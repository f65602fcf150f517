"""The loss behind a frozen head is transformers' own, in value and gradient, for families that change their logits."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from glora_llm.data.batch import collate
from glora_llm.data.store import Row
from glora_llm.training import output_head
from glora_llm.training.batch import to_device
from glora_llm.training.objectives import CausalLMObjective

VOCABULARY = 48
SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "vocab_size": VOCABULARY, "num_hidden_layers": 2, "use_cache": False,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
# What is special about each: a decoder inside of another module, a bias, scaled or bent logits, router logits.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_tied": {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "phi": {"partial_rotary_factor": 1.0},
    "falcon": {"alibi": False},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 4},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "mixtral": {"num_local_experts": 2},
}


def build(family: str) -> Any:
    torch.manual_seed(0)
    sizes = SMALL | FAMILIES[family]
    if family == "falcon":
        del sizes["head_dim"]  # it computes that itself
    config = AutoConfig.for_model(family.partition("_")[0], **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def batch_of(seed: int = 0, lengths: tuple[int, ...] = (9, 4, 13)) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    made = [Row(draw.integers(0, VOCABULARY, n).astype(np.int32), draw.random(n) < 0.7, [0]) for n in lengths]
    return collate(made, pad_id=0)


def naive(model: Any, batch: dict[str, Any]) -> Tensor:
    """The model's own forward pass over each row, all its logits in float64, and the definition of the loss."""
    width = batch["input_ids"].shape[1]
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for place, target in zip(batch["target_index"].tolist(), batch["targets"].tolist(), strict=True):
        row, at = divmod(place, width)
        logits = model(batch["input_ids"][row : row + 1], use_cache=False).logits[0, at].double()
        total = total - logits.log_softmax(-1)[target]
    return total


def decoder_gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trained_head", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_familys_own(family: str, trained_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_head, "LOGITS_AT_ONCE", 5 * VOCABULARY)  # several chunks
    model, batch = build(family), batch_of()
    for parameter in model.get_output_embeddings().parameters():
        parameter.requires_grad_(trained_head)
    expected, loss = naive(model, batch), CausalLMObjective(model)(**batch)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    theirs, mine = decoder_gradients(model, expected), decoder_gradients(model, loss)
    assert theirs.keys() == mine.keys() and len(theirs) > 8
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_frozen_head_in_float64(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the loss and its gradient of the logits are rounded to float32."""
    monkeypatch.setattr(output_head, "LOGITS_AT_ONCE", 5 * VOCABULARY)
    model, batch = build("llama").double().to(device), to_device(batch_of(), device)
    model.lm_head.requires_grad_(False)
    theirs = decoder_gradients(model, naive(model, batch))
    for name, gradient in decoder_gradients(model, CausalLMObjective(model)(**batch)).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_gradient_that_arrives_scales_it() -> None:
    """A loss scale and the division by the targets come after the loss."""
    model, batch = build("llama"), batch_of()
    model.lm_head.requires_grad_(False)
    objective = CausalLMObjective(model)
    plain = decoder_gradients(model, objective(**batch))
    for name, gradient in decoder_gradients(model, objective(**batch) * 256 + 3).items():
        torch.testing.assert_close(gradient, 256 * plain[name], msg=name)


def test_nothing_of_the_vocabularys_size_is_kept_behind_a_frozen_head() -> None:
    model, batch = build("llama"), batch_of()
    for trained, expected in ((False, 0), (True, 1)):
        model.lm_head.requires_grad_(trained)
        kept: list[tuple[int, ...]] = []

        def keep(tensor: Tensor, kept: list[tuple[int, ...]] = kept) -> Tensor:
            kept.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            CausalLMObjective(model)(**batch)
        logits = [shape for shape in kept if VOCABULARY in shape and set(shape) != {VOCABULARY, 16}]
        assert len(kept) > 10 and (len(logits) > 0) == expected, logits


def test_the_head_runs_once_however_many_chunks_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO 3 gathers it at every call, and every process must call it equally often."""
    model = build("llama")
    calls: list[None] = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(None))
    objective = CausalLMObjective(model)
    for trained in (False, True):
        model.lm_head.requires_grad_(trained)
        for tokens in (1, 1000):
            monkeypatch.setattr(output_head, "LOGITS_AT_ONCE", tokens * VOCABULARY)
            calls.clear()
            objective(**batch_of()).backward()
            assert len(calls) == 1
            objective(**batch_of(), score=True)
            assert len(calls) == 2
    assert "forward" not in vars(model.lm_head)


def test_the_chunk_follows_the_vocabulary() -> None:
    """512 tokens of a vocabulary of 128k: 0.26 GB of float32 logits."""
    head = CausalLMObjective(build("llama")).head
    hidden = torch.empty(5000, 16, device="meta")
    for vocabulary, rows in ((128256, 523), (32000, 2097)):
        head.vocabulary = vocabulary
        assert next(head.chunks(hidden))[0].shape == (rows, 16)
        assert rows * vocabulary * 4 < 0.27e9


def test_bfloat16_weights_give_a_float32_loss(device: torch.device) -> None:
    model, batch = build("llama").to(device), to_device(batch_of(), device)
    exact = CausalLMObjective(model)(**batch)
    model.to(torch.bfloat16).lm_head.requires_grad_(False)
    rough = CausalLMObjective(model)(**batch)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.1)
    rough.backward()
    assert model.model.embed_tokens.weight.grad.dtype == torch.bfloat16
