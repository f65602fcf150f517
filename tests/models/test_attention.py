"""Packed samples are separate samples, in values and gradients, with every attention backend; which one is taken."""

import re
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from glora_llm.data.batch import collate, join
from glora_llm.data.store import Row
from glora_llm.errors import UserError
from glora_llm.models import attention
from glora_llm.models.attention import attention_arguments, fetch_kernel, packed_arguments
from glora_llm.models.load import load_base
from glora_llm.models.resolve import ResolvedModel
from glora_llm.schema import ModelSection
from glora_llm.training.batch import to_device
from glora_llm.training.objectives import CausalLMObjective

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
Section = Callable[..., ModelSection]


def configuration(family: str) -> PretrainedConfig:
    return AutoConfig.for_model(family, **SMALL | (FAMILIES | OTHERS)[family])


def build(family: str, backend: str, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    attention.register()
    model = AutoModelForCausalLM.from_config(configuration(family), attn_implementation=backend, dtype=dtype)
    return model.to(device).eval()


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
    assert attention_arguments(ModelSection(name_or_path="x"), configuration(family), CPU, torch.float32) == {
        "attn_implementation": "segments"
    }
    require_separate_samples(build(family, "segments"), build(family, "eager"), ROWS, 1e-4, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_segments_are_what_each_family_computes_on_gpu(family: str) -> None:
    packed = build(family, "varlen", GPU, torch.bfloat16)
    require_separate_samples(packed, build(family, "eager", GPU, torch.bfloat16), ROWS, 0.05, 0.1)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_keep_transformers_own(family: str, section: Section) -> None:
    config = configuration(family)
    assert attention_arguments(section(), config, CPU, torch.float32) == {}
    with pytest.raises(UserError, match=r"model.attention is segments, (and|which) .*Set model.attention to auto"):
        attention_arguments(section(attention="segments"), config, CPU, torch.float32)


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


def test_a_compiled_layer_holds_varlen_without_a_break(section: Section) -> None:
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
    config = configuration("llama")
    assert attention_arguments(section(compile=True), config, CPU, torch.float32) == {}


def test_flash_attention_2_is_told_the_segments() -> None:
    """So transformers looks for them in no layer (which would wait for the GPU); its mask stays unused."""
    batch = collate(ROWS, pad_id=2)
    for name in ("flash_attention_2", "kernels-community/flash-attn3"):
        found = packed_arguments(name, batch["segment_offsets"], batch["segment_lengths"])
        assert found.keys() == {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
        assert found["cu_seq_lens_k"] is batch["segment_offsets"] and found["max_length_q"] == 21
    for name in ("eager", "sdpa", "flex_attention"):
        assert packed_arguments(name, batch["segment_offsets"], batch["segment_lengths"]) == {}


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [((8, 0), torch.bfloat16, "varlen"), ((8, 6), torch.float16, "varlen"), ((8, 0), torch.float32, None),
     ((7, 5), torch.float16, None)],
)  # fmt: skip
def test_auto_on_a_gpu(
    capability: tuple[int, int], dtype: torch.dtype, expected: str | None, section: Section,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = attention_arguments(section(), configuration("llama"), GPU, dtype)
    assert found == ({} if expected is None else {"attn_implementation": expected})


def test_auto_leaves_heads_that_flash_attention_lacks(section: Section, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = AutoConfig.for_model("llama", **SMALL | {"head_dim": 12})
    assert attention_arguments(section(), config, GPU, torch.bfloat16) == {}
    with pytest.raises(UserError, match="varlen, which has no heads of size 12"):
        attention_arguments(section(attention="varlen"), config, GPU, torch.bfloat16)


def test_auto_leaves_images_alone(section: Section) -> None:
    config = AutoConfig.for_model("vit", hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    assert attention_arguments(section(), config, CPU, torch.float32) == {}


@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        ("flash_attention_2", CPU, torch.bfloat16, "which needs a GPU; this is the cpu"),
        ("flash_attention_2", GPU, torch.bfloat16, "but flash-attn is not installed"),
        ("flash_attention_2", GPU, torch.float32, "which computes in bfloat16 or float16, not in float32: set model"),
        ("varlen", CPU, torch.bfloat16, "which needs a GPU; this is the cpu"),
        ("varlen", GPU, torch.float32, "which computes in bfloat16 or float16, not in float32: set model.dtype"),
        ("varlen", GPU, torch.bfloat16, f"which torch {torch.__version__} does not have"),
        ("kernels-community/flash-attn3", CPU, torch.bfloat16, "which needs a GPU; this is the cpu"),
        ("flex_attention", CPU, torch.float32, "which has no backward pass on a CPU"),
    ],
)
def test_backends_that_are_not_there(
    name: str, device: torch.device, dtype: torch.dtype, message: str, section: Section,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape(f"model.attention is {name}, {message}")):
        attention_arguments(section(attention=name), configuration("llama"), device, dtype)


def test_kernels_of_the_hub(section: Section, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "kernels-community/flash-attn3"
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    fetch_kernel("sdpa")
    with pytest.raises(UserError, match="needs the package kernels: pip install kernels"):
        fetch_kernel(name, download=False)
    with pytest.raises(ValueError, match="attention"):
        section(attention="somebody/flash-attn3")
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    fetch_kernel(name, download=False)  # a dry run leaves it where it is
    monkeypatch.setitem(sys.modules, "kernels", ModuleType("kernels"))
    with pytest.raises(UserError, match="cannot be loaded from the hub"):
        fetch_kernel(name)


def test_a_loaded_model_has_it(tiny: ResolvedModel, section: Section) -> None:
    models = {name: load_base(section(attention=name), tiny.folder, CPU, zero3=False) for name in ("auto", "eager")}
    assert models["auto"].config._attn_implementation == "segments"
    assert "segments" not in models["auto"].config.to_json_string(), "a merged model is plain transformers"
    ids = torch.tensor([[1, 40, 41, 42, 3]])
    torch.testing.assert_close(models["auto"](ids).logits, models["eager"](ids).logits, rtol=1e-4, atol=1e-5)
