"""Which attention backend a model gets, and what is said of one that is not there."""

import re
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from transformers import AutoConfig

from glora_llm.errors import UserError
from glora_llm.models import attention
from glora_llm.models.attention import attention_arguments, fetch_kernel, packed_arguments
from glora_llm.models.load import load_base
from glora_llm.models.resolve import ResolvedModel
from glora_llm.schema import ModelSection
from tests.models.small_models import CPU, FAMILIES, GPU, OTHERS, SMALL, configuration

Section = Callable[..., ModelSection]


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_on_a_cpu(family: str, section: Section) -> None:
    found = attention_arguments(section(), configuration(family), CPU, torch.float32)
    assert found == {"attn_implementation": "segments"}
    assert attention_arguments(section(compile=True), configuration(family), CPU, torch.float32) == {}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_keep_transformers_own(family: str, section: Section) -> None:
    config = configuration(family)
    assert attention_arguments(section(), config, CPU, torch.float32) == {}
    with pytest.raises(UserError, match=r"model.attention is segments, (and|which) .*Set model.attention to auto"):
        attention_arguments(section(attention="segments"), config, CPU, torch.float32)


def test_flash_attention_2_is_told_the_segments() -> None:
    """So transformers looks for them in no layer (which would wait for the GPU); its mask stays unused."""
    offsets, lengths = torch.tensor([0, 7, 9, 21], dtype=torch.int32), (7, 2, 12)
    for name in ("flash_attention_2", "kernels-community/flash-attn3"):
        found = packed_arguments(name, offsets, lengths)
        assert found.keys() == {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
        assert found["cu_seq_lens_k"] is offsets and found["max_length_q"] == 12
    for name in ("eager", "sdpa", "flex_attention"):
        assert packed_arguments(name, offsets, lengths) == {}


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
    models = {name: load_base(section(attention=name), tiny.folder, CPU) for name in ("auto", "eager")}
    assert models["auto"].config._attn_implementation == "segments"
    assert "segments" not in models["auto"].config.to_json_string(), "a merged model is plain transformers"
    ids = torch.tensor([[1, 40, 41, 42, 3]])
    torch.testing.assert_close(models["auto"](ids).logits, models["eager"](ids).logits, rtol=1e-4, atol=1e-5)
