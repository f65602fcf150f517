"""A launch that does not fit its GPUs is refused before anything is written; `torch.cuda` is replaced here."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from glora_llm import recipe as recipes
from glora_llm.cli import main
from glora_llm.errors import UserError
from glora_llm.models.resolve import ResolvedModel
from glora_llm.plan.gpu_fit import describe_memory
from glora_llm.plan.memory import compute_memory

BF16 = torch.bfloat16
WIDE = ["model.dtype=bfloat16", "data.max_tokens=512", "training.micro_batch=8", "training.global_batch=16"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return what makes this a machine with one GPU of so many bytes."""

    def make(total: int) -> None:
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)  # which may say that the GPU is not to be used
        properties = SimpleNamespace(name="Small GPU", total_memory=total)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _number: properties)

    return make


def test_what_does_not_fit_is_refused_with_settings_that_do(tiny: ResolvedModel, gpu: Callable[[int], None]) -> None:
    """Each proposal, taken as it stands, fits and needs what the message says."""
    recipe = recipes.load("tiny_cpu", WIDE)
    need = compute_memory(recipe, tiny.folder, 1, BF16)
    gpu(need.peak)
    assert "GB a GPU (computed, not measured)" in describe_memory(recipe, tiny.folder, 1)
    gpu(need.peak - 1)
    with pytest.raises(UserError) as refused:
        describe_memory(recipe, tiny.folder, 1)
    message = str(refused.value)
    assert f"needs {need.peak / 1e9:.1f} GB (computed; base" in message and "Small GPU has" in message
    proposals = re.findall(r"((?:\S+=\S+ )+)\(([\d.]+) GB\)", message.partition("What fits: ")[2])
    assert [text.strip() for text, _ in proposals] == [
        "training.micro_batch=4",
        "model.gradient_checkpointing=true",
        "adapter.rank=2",
        "model.quantization=nf4",
    ]
    for text, gb in proposals:
        peak = compute_memory(recipes.load("tiny_cpu", [*WIDE, *text.split()]), tiny.folder, 1, BF16).peak
        assert peak < need.peak and f"{peak / 1e9:.1f}" == gb


def test_settings_are_combined_where_none_alone_fits(tiny: ResolvedModel, gpu: Callable[[int], None]) -> None:
    narrow = [*WIDE, "model.quantization=nf4", "training.micro_batch=2"]
    both = ["model.gradient_checkpointing=true", "training.micro_batch=1"]
    gpu(compute_memory(recipes.load("tiny_cpu", [*narrow, *both]), tiny.folder, 1, BF16).peak)
    with pytest.raises(UserError) as refused:
        describe_memory(recipes.load("tiny_cpu", narrow), tiny.folder, 1)
    assert re.search(rf"What fits: {' '.join(both)} \([^;]*\)\.$", str(refused.value))
    gpu(1_000_000)
    with pytest.raises(UserError, match="What fits: no micro_batch, checkpointing, quantization or ZeRO stage"):
        describe_memory(recipes.load("tiny_cpu", [*narrow, *both]), tiny.folder, 1)


def test_weights_that_fit_no_gpu_are_divided_or_quantised(tmp_path: Path, gpu: Callable[[int], None]) -> None:
    """LLaMA-2-7B in bfloat16, 13.5 GB, on four GPUs of 12 GB: no batch is small enough."""
    LlamaConfig(intermediate_size=11008, max_position_embeddings=4096).save_pretrained(tmp_path)
    recipe = recipes.load("llama2_glora", ["model.quantization=none", "training.global_batch=16"])
    gpu(12_000_000_000)
    with pytest.raises(UserError) as refused:
        describe_memory(recipe, tmp_path, 4)
    proposals = str(refused.value).partition("What fits: ")[2]
    assert re.fullmatch(r"training.deepspeed=zero3 \([\d.]+ GB\); model.quantization=nf4 \([\d.]+ GB\)\.", proposals)


def test_a_dry_run_computes_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--recipe", "tiny_cpu", "--dry-run", f"output.dir={tmp_path / 'run'}"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"memory     [\d.]+ GB a GPU on 1; .* on \d \(computed, not measured\)", printed)


def test_a_refused_launch_ends_with_code_2_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gpu: Callable[[int], None]
) -> None:
    gpu(1_000_000)
    assert main(["train", "--recipe", "tiny_cpu", f"output.dir={tmp_path / 'run'}"]) == 2
    assert "Small GPU has 0.0 GB" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_measured_is_not_refused(tmp_path: Path, gpu: Callable[[int], None]) -> None:
    """The last layer alone is adapted, and the few that are measured are not among them."""
    LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=4).save_pretrained(
        tmp_path
    )
    gpu(1)
    recipe = recipes.load("tiny_cpu", ["adapter.targets=.*layers\\.4.*up_proj"])
    assert describe_memory(recipe, tmp_path, 1).startswith("not computed: a step of this model cannot be followed")


@pytest.mark.parametrize(
    ("overrides", "reason"), [(["adapter.method=vera", "adapter.slots=null"], "not computed for adapter.method vera")]
)
def test_what_is_not_computed_says_so(overrides: list[str], reason: str, tiny: ResolvedModel) -> None:
    assert describe_memory(recipes.load("tiny_cpu", overrides), tiny.folder, 1) == reason
