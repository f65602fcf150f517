"""A GPT-2, whose linears keep their weights transposed, and an adapted embedding that was tied to the head."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from glora_llm.cli.main import main
from glora_llm.models.load import load_base
from glora_llm.models.resolve import ResolvedModel
from tests.glora.test_merged_families import small
from tests.in_process import alone, one_thread
from tests.merge.conftest import CPU, Train, Trained, logits

__all__ = ["alone", "one_thread"]
SLOTS = {"A": "lora", "B": "lora", "C": "vector", "D": "vector", "E": "vector"}


@pytest.fixture(scope="module")
def gpt2(tiny: ResolvedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random GPT-2 of two layers and the tiny LLaMA's tokenizer."""
    base = tmp_path_factory.mktemp("gpt2")
    model = small("gpt2", vocab_size=260, n_positions=512, n_embd=64)
    assert model is not None
    model.save_pretrained(base)
    for file in tiny.folder.glob("token*"):
        shutil.copy(file, base)
    return base


def merged(trained: Trained, out: Path) -> Any:
    assert main(["merge", str(trained.folder.path), "--out", str(out), "--dtype", "float32"]) == 0
    again, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return again.eval()


@pytest.mark.parametrize(
    "keys",
    [
        {"slots": SLOTS},
        pytest.param({"slots": SLOTS, "model": {"quantization": "nf4"}}, marks=pytest.mark.slow),
        {"slots": {"A": "lora", "B": "lora"}, "composition": "hadamard", "targets": ["c_attn", "wte", "wpe"]},
        pytest.param({"method": "ssf", "model": {"quantization": "nf4"}}, marks=pytest.mark.slow),
    ],
    ids=["all slots", "nf4", "hadamard, with embeddings", "ssf on nf4"],
)
def test_it_merges_into_what_plain_transformers_loads(keys: Any, gpt2: Path, train: Train, tmp_path: Path) -> None:
    trained = train(**keys | {"model": {"name_or_path": str(gpt2), "dtype": "float32", **keys.get("model", {})}})
    expected, plain = trained.logits(), logits(load_base(trained.plan.recipe.model, gpt2, CPU))
    again = merged(trained, tmp_path / "out")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=2e-4)
    assert (plain - expected).abs().max() > 1e-2
    assert again.config.tie_word_embeddings is ("wte" not in keys.get("targets", []))


def test_it_is_exported_as_a_plain_lora(gpt2: Path, train: Train, tmp_path: Path) -> None:
    trained = train(slots=SLOTS, model={"name_or_path": str(gpt2)})
    assert main(["merge", str(trained.folder.path), "--out", str(tmp_path / "lora"), "--to", "lora"]) == 0
    base = load_base(trained.plan.recipe.model, gpt2, CPU)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    through_peft = logits(PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval())
    torch.testing.assert_close(through_peft, trained.logits(), rtol=1e-4, atol=2e-4)


@pytest.mark.slow
def test_an_adapted_embedding_is_no_longer_the_head(train: Train, tmp_path: Path) -> None:
    """The tiny LLaMA's embedding is its head too: A, B and E of the embedding leave the head as it was."""
    slots = {"A": "lora", "B": "lora", "E": "vector"}
    trained = train(slots=slots, targets=["embed_tokens", "q_proj"])
    again = merged(trained, tmp_path / "out")
    torch.testing.assert_close(logits(again), trained.logits(), rtol=1e-4, atol=2e-4)
    assert again.config.tie_word_embeddings is False
