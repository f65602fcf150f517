"""Packed samples are separate samples, in values and gradients, with every attention backend."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glora_llm.data.batch import collate, join
from glora_llm.data.store import Row
from glora_llm.models.attention import packed_arguments
from glora_llm.training.batch import to_device
from glora_llm.training.objectives import CausalLMObjective
from tests.models.small_models import FAMILIES, GPU, build


def row(*lengths: int, first: int = 5) -> Row:
    """A row of samples whose targets are all but the first token."""
    tokens = (np.arange(first, first + sum(lengths)) * 7 % 48).astype(np.int32)
    return Row(tokens, np.ones(len(tokens), dtype=np.bool_), [0, *np.cumsum(lengths)[:-1].tolist()])


ROWS = [row(7, 5, 9), row(1, 12, first=30), row(6, first=40), row(3, 1, 4, first=20)]
# The same samples: in rows with padding, in one row, and one sample a row (segments of like length).
BATCHES: dict[str, list[Row]] = {"rows": ROWS, "one row": [join(ROWS)], "like lengths": [row(6), row(6, first=9)]}


def loss_and_gradients(model: Any, rows: list[Row]) -> tuple[Tensor, dict[str, Tensor]]:
    objective = CausalLMObjective(model, partial(packed_arguments, model.config._attn_implementation))
    model.zero_grad()
    loss = objective(**to_device(collate(rows, pad_id=2), model.device))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_by_one(model: Any, rows: list[Row]) -> tuple[Tensor, dict[str, Tensor]]:
    """Every sample alone in a forward pass of transformers itself."""
    model.zero_grad()
    total = torch.zeros((), device=model.device)
    for given in rows:
        for start, stop in zip(given.starts, [*given.starts[1:], len(given.tokens)], strict=True):
            ids = torch.from_numpy(given.tokens[start:stop].astype(np.int64))[None].to(model.device)
            if ids.shape[1] > 1:
                total = total + model(ids, labels=ids, use_cache=False).loss.float() * (ids.shape[1] - 1)
    total.backward()
    return total.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def require_separate_samples(packed: Any, alone: Any, rows: list[Row], rtol: float, atol: float) -> None:
    expected, theirs = one_by_one(alone, rows)
    loss, mine = loss_and_gradients(packed, rows)
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=atol)
    assert mine.keys() == theirs.keys() and len(mine) > 10
    for name, gradient in theirs.items():
        scale = float(gradient.abs().max())
        assert scale > 0 or "bias" in name, name
        torch.testing.assert_close(mine[name], gradient, rtol=rtol, atol=atol * max(scale, 1.0), msg=name)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("layout", BATCHES)
@pytest.mark.parametrize("backend", ["eager", "sdpa", "segments"])
def test_packed_samples_are_separate_samples(backend: str, layout: str, checkpointing: bool) -> None:
    packed = build("llama", backend)
    if checkpointing:
        packed.train().activation_checkpointing_enable({"use_reentrant": False})
    require_separate_samples(packed, build("llama", "eager"), BATCHES[layout], 1e-4, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", BATCHES)
@pytest.mark.parametrize("backend", ["varlen", "flash_attention_2", "flex_attention", "sdpa", "segments"])
def test_packed_samples_are_separate_samples_on_gpu(backend: str, layout: str) -> None:
    if backend == "flash_attention_2":
        pytest.importorskip("flash_attn")
    packed = build("llama", backend, GPU, torch.bfloat16)
    require_separate_samples(packed, build("llama", "eager", GPU, torch.bfloat16), BATCHES[layout], 0.05, 0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_are_what_each_family_computes(family: str) -> None:
    """Windows, scales of their own and heads in groups included."""
    require_separate_samples(build(family, "segments"), build(family, "eager"), ROWS, 1e-4, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_segments_are_what_each_family_computes_on_gpu(family: str) -> None:
    packed = build(family, "varlen", GPU, torch.bfloat16)
    require_separate_samples(packed, build(family, "eager", GPU, torch.bfloat16), ROWS, 0.05, 0.1)


def test_a_leak_would_be_seen() -> None:
    """Without its segments a model sees the samples before: the tests above can fail."""
    model = build("llama", "segments")
    ids = torch.from_numpy(ROWS[0].tokens.astype(np.int64))[None]
    with torch.no_grad():
        leaking, alone = model(ids, use_cache=False).logits[0, 7:12], model(ids[:, 7:12], use_cache=False).logits[0]
    assert (leaking - alone).abs().max() > 1e-3


def test_without_segments_it_is_sdpa() -> None:
    """A plain call, positions that start again, and left padding in generation."""
    models = [build("llama", name) for name in ("sdpa", "segments", "varlen")]
    batch = collate(ROWS, pad_id=2)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    padded = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        logits = [model(**inputs, use_cache=False).logits for model in models]
        said = [
            model.generate(padded, attention_mask=mask, max_new_tokens=4, use_cache=True, pad_token_id=0)
            for model in models
        ]
    for found, words in zip(logits[1:], said[1:], strict=True):
        assert torch.equal(found, logits[0]) and torch.equal(words, said[0])


VARLEN_SIGNATURES = [("scale", "window_size", "enable_gqa"), ("scale", "window_size")]


@pytest.mark.parametrize("names", VARLEN_SIGNATURES, ids=["torch 2.13", "torch 2.11"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_varlen_gets_the_arguments_of_flash_attention(
    family: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the kernel computes by its documented arguments, and takes no other ones."""
    import torch.nn.attention.varlen as module

    def by_hand(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, window: tuple[int, int], scale: float) -> Tensor:
        assert cu.dtype == torch.int32 and window[1] == 0
        heads = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
        outputs = []
        for start, stop in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
            scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop]) * scale
            seen = torch.ones_like(scores, dtype=torch.bool).tril()
            if window[0] >= 0:
                seen &= torch.ones_like(seen).triu(-window[0])
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", weights, v[start:stop]))
        return torch.cat(outputs)

    def of_torch_2_13(q, k, v, cu, cu_k, longest, longest_k, *, scale, window_size, enable_gqa=False):  # type: ignore[no-untyped-def] # noqa: PLR0913
        assert cu is cu_k and longest == longest_k == max(cu.diff()) and (enable_gqa or q.shape == k.shape)
        return by_hand(q, k, v, cu, window_size, scale)

    def of_torch_2_11(q, k, v, cu, cu_k, longest, longest_k, *, scale, window_size):  # type: ignore[no-untyped-def] # noqa: PLR0913
        assert q.shape == k.shape
        return by_hand(q, k, v, cu, window_size, scale)

    monkeypatch.setattr(module, "varlen_attn", of_torch_2_13 if "enable_gqa" in names else of_torch_2_11)
    require_separate_samples(build(family, "varlen"), build(family, "eager"), ROWS, 1e-4, 1e-5)


def test_a_compiled_layer_holds_varlen_without_a_break() -> None:
    """Traced with tensors without values: the kernel itself needs a GPU."""
    model, batch = build("llama", "varlen", dtype=torch.bfloat16), collate(ROWS, pad_id=2)
    told = packed_arguments("varlen", batch["segment_offsets"], batch["segment_lengths"])
    states = torch.zeros(*batch["input_ids"].shape, 32, dtype=torch.bfloat16)
    positions = model.model.rotary_emb(states, batch["position_ids"])

    def layer(states: Tensor, offsets: Tensor, longest: int) -> Any:
        flash = {"cu_seq_lens_q": offsets, "max_length_q": longest, "attention_mask": told["attention_mask"]}
        return model.model.layers[0](states, position_embeddings=positions, **flash)

    graph = torch._dynamo.export(layer)(states, batch["segment_offsets"], 21).graph_module.graph
    assert [node.target for node in graph.nodes].count(torch.ops.torch_attn._varlen_attn) == 1
