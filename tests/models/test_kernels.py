"""Liger's own kernels need a GPU; here a stand-in does what its patch does to transformers' module."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from glora_llm.errors import UserError
from glora_llm.models.kernels import apply_liger, uses_liger
from glora_llm.models.load import load_base
from glora_llm.models.resolve import ResolvedModel
from glora_llm.schema import ModelSection

IDS = torch.tensor([[1, 40, 41, 3]])
GPU = torch.device("cuda", 0)
STAND_IN = """
def rotary(*args, **kwargs):
    raise RuntimeError("a GPU kernel ran on the CPU")

def _apply_liger_kernel_to_instance(model, **kwargs):
    from transformers.models.llama import modeling_llama
    modeling_llama.apply_rotary_pos_emb = rotary
    modeling_llama.LlamaRMSNorm = modeling_llama.LlamaMLP = None
    model.patched_with = kwargs
"""


@pytest.fixture
def liger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = tmp_path / "liger_kernel" / "transformers"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text(STAND_IN)
    (package / "monkey_patch.py").write_text('MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}')
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))  # puts it back afterwards
    yield
    for name in [name for name in sys.modules if name.startswith("liger_kernel")]:
        del sys.modules[name]


@pytest.fixture
def model(tiny: ResolvedModel, section: Callable[..., ModelSection]) -> PreTrainedModel:
    return load_base(section(kernels="none"), tiny.folder, torch.device("cpu"))


def test_patches_the_instance_and_not_the_head(liger: None, model: PreTrainedModel) -> None:
    assert uses_liger("auto", "llama", GPU)
    apply_liger(model)
    on = {name for name, wanted in model.patched_with.items() if wanted}
    assert on == {"rope", "rms_norm", "swiglu", "geglu"}
    assert model.patched_with["fused_linear_cross_entropy"] is False


def test_other_models_stay_as_they_were(liger: None, model: PreTrainedModel) -> None:
    norm, block = modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP
    expected = model(IDS).logits
    for _ in range(2):
        apply_liger(model)
        assert (modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP) == (norm, block)
        assert torch.equal(model(IDS).logits, expected)  # tensors on the CPU take the original path


def test_auto_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glora_llm.models.kernels.find_spec", lambda name: None)
    assert not uses_liger("auto", "llama", GPU)
    with pytest.raises(UserError, match="liger_kernel is not installed"):
        uses_liger("liger", "llama", GPU)


def test_choices(liger: None) -> None:
    assert uses_liger("liger", "llama", GPU) and not uses_liger("none", "llama", GPU)
    assert not uses_liger("auto", "llama", torch.device("cpu")) and not uses_liger("auto", "unheard_of", GPU)
    with pytest.raises(UserError, match="no kernels for model type 'unheard_of'"):
        uses_liger("liger", "unheard_of", GPU)
