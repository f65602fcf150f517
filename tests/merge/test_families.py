"""Bases that are not a bias-free LLaMA with a head of its own: biases, tied embeddings, Qwen2, adapters on the head."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from glora_llm.errors import UserError
from glora_llm.merge.command import merge_run
from glora_llm.merge.lora_export import write_lora
from glora_llm.merge.model_merge import write_merged
from glora_llm.models.load import load_base
from glora_llm.models.resolve import ResolvedModel
from glora_llm.plan.overview import describe
from tests.merge.conftest import ALL_MODES, CPU, Train, Trained, logits

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 260,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama with attention biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "tied llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
}
Folders = dict[str, str]


@pytest.fixture(scope="module")
def folders(tiny: ResolvedModel, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A folder for each family, with random biases and the tiny model's tokenizer."""
    made = {}
    for name, build in FAMILIES.items():
        folder = tmp_path_factory.mktemp("family")
        for file in tiny.folder.glob("token*"):
            shutil.copy(file, folder)
        torch.manual_seed(0)
        model = build()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.data.normal_()
        model.save_pretrained(folder)
        made[name] = str(folder)
    assert "lm_head.weight" not in load_file(Path(made["tied llama"]) / "model.safetensors")
    return made


def require_merged_equals_unmerged(trained: Trained, out: Path) -> Any:
    expected = trained.logits()
    base = AutoModelForCausalLM.from_pretrained(trained.plan.base.folder).eval()
    assert (expected - logits(base)).abs().max() > 0.05
    write_merged(trained.plan, trained.folder.adapter, out, trained.dtype, "float32")
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(model.eval()), expected, rtol=1e-4, atol=2e-4)
    return model


WITH_D = ALL_MODES | {"D": "vector"}
CASES = [
    ("llama with attention biases", {"slots": ALL_MODES}),
    ("llama with attention biases", {"preset": "ssf"}),
    ("llama with attention biases", {"slots": ALL_MODES | {"D": "scalar"}, "targets": ["o_proj"]}),
    ("llama with attention biases", {"method": "dora"}),
    ("qwen2", {"slots": WITH_D, "targets": ["q_proj", "k_proj", "v_proj"]}),
    ("qwen2", {"slots": {"A": "lora", "B": "lora"}}),
    ("qwen2", {"slots": {"B": "lora"}, "paths": {"v_proj": {"A": "vector", "C": "lora", "D": "scalar"}}}),
    ("tied llama", {"slots": ALL_MODES}),
    ("tied llama", {"slots": {"B": "lora"}, "modules_to_save": ["lm_head"]}),
    ("tied llama", {"slots": {"B": "lora"}, "modules_to_save": ["embed_tokens", "lm_head"]}),
    ("tied llama", {"slots": {"B": "lora"}, "modules_to_save": ["embed_tokens"]}),
    ("qwen2", {"method": "lora", "peft": {"bias": "lora_only"}}),
]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(("family", "adapter"), CASES)
def test_merged_equals_unmerged(
    family: str, adapter: dict[str, Any], quantization: str, folders: Folders, train: Train, tmp_path: Path
) -> None:
    trained = train(model={"name_or_path": folders[family], "quantization": quantization}, **adapter)
    model = require_merged_equals_unmerged(trained, tmp_path / "out")
    assert model.config.model_type == ("qwen2" if family == "qwen2" else "llama")
    tied = family == "tied llama" and "modules_to_save" not in adapter
    assert model.config.tie_word_embeddings is tied


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_export_with_a_frozen_bias(quantization: str, folders: Folders, train: Train, tmp_path: Path) -> None:
    base = {"name_or_path": folders["qwen2"], "quantization": quantization}
    trained = train(model=base, slots=WITH_D, targets=["q_proj", "v_proj"])
    write_lora(trained.plan, trained.folder.adapter, tmp_path / "lora", trained.dtype)
    again = load_base(trained.plan.recipe.model, trained.plan.base.folder, CPU)
    found = logits(PeftModel.from_pretrained(again, str(tmp_path / "lora")).eval())
    torch.testing.assert_close(found, trained.logits(), rtol=1e-4, atol=2e-4)


def test_a_family_without_the_bias_says_what_can_be_merged(folders: Folders, train: Train, tmp_path: Path) -> None:
    trained = train(model={"name_or_path": folders["qwen2"]}, slots=ALL_MODES)
    said = r"slots C and E give a bias to down_proj, gate_proj, o_proj, up_proj, and a qwen2 model .* has none there"
    with pytest.raises(UserError, match=said):
        merge_run(trained.folder.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_run(trained.folder.path, tmp_path / "lora", to="lora")
    assert json.loads((tmp_path / "lora" / "merge_report.json").read_text())["max_abs_logit_diff"] < 1e-3


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("adapter", [{"slots": {"A": "lora", "B": "lora"}}, {"method": "lora"}])
def test_an_adapter_on_the_head(adapter: dict[str, Any], quantization: str, train: Train, tmp_path: Path) -> None:
    trained = train(**adapter, targets=["lm_head", "q_proj"], model={"quantization": quantization})
    require_merged_equals_unmerged(trained, tmp_path / "out")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_exporting_an_adapter_on_the_head(quantization: str, train: Train, tmp_path: Path) -> None:
    targets = ["lm_head", "q_proj"]
    trained = train(slots={"A": "lora", "B": "lora"}, targets=targets, model={"quantization": quantization})
    write_lora(trained.plan, trained.folder.adapter, tmp_path / "lora", trained.dtype)
    again = load_base(trained.plan.recipe.model, trained.plan.base.folder, CPU)
    found = logits(PeftModel.from_pretrained(again, str(tmp_path / "lora")).eval())
    torch.testing.assert_close(found, trained.logits(), rtol=1e-4, atol=2e-4)


def test_c_and_e_on_the_head_can_be_trained(train: Train) -> None:
    assert "cannot be merged" in describe(train(slots=ALL_MODES, targets=["lm_head"]).plan)


def test_the_base_s_files_stay_as_they_are(folders: Folders, train: Train, tmp_path: Path) -> None:
    folder = Path(folders["tied llama"])
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    trained = train(model={"name_or_path": str(folder)}, slots=ALL_MODES)
    merge_run(trained.folder.path, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
