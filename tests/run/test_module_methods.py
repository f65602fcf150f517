"""SSF and RepAdapter as whole runs: which weights of a ViT they merge into; without the biases that they would add."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from tests.in_process import alone, one_thread
from tests.run.methods_walk import MODELS, Walker

__all__ = ["alone", "one_thread"]


@pytest.mark.parametrize("method", ["ssf", "repadapter"])
def test_a_vit(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Walker(MODELS["vit"], tmp_path).walk(method, tmp_path, capsys)
    merged, base = (AutoModelForImageClassification.from_pretrained(tmp_path / name) for name in ("merged", "base"))
    changed = {
        name.rpartition(".")[2] if "layernorm" in name else name.split(".")[-2]
        for name, value in base.vit.state_dict().items()
        if not torch.equal(value, merged.vit.state_dict()[name])
    }
    readers = {"q_proj", "k_proj", "v_proj", "fc1"}
    assert changed == (
        readers if method == "repadapter" else readers | {"o_proj", "fc2", "projection", "weight", "bias"}
    )


@pytest.mark.slow
@pytest.mark.parametrize(("method", "argument"), [("ssf", "shift_without_bias"), ("repadapter", "with_bias")])
def test_a_llama_in_nf4_under_zero_3(
    method: str, argument: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without added biases, which the merged model then has none of."""
    more = ["model.quantization=nf4", "training.deepspeed=zero3", f"adapter.peft={{{argument}: false}}"]
    Walker(MODELS["llama"], tmp_path).walk(method, tmp_path, capsys, *more)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not merged.config.attention_bias and not merged.config.mlp_bias
