"""SSF and RepAdapter as whole runs: resumed bit for bit, merged with equal answers, counted without weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from glora_llm.cli import main
from glora_llm.compare.budget import parameters_of
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from tests.in_process import alone, one_thread, train_in_process

__all__ = ["alone", "one_thread"]
METHODS = ("ssf", "repadapter")
IMAGES = [
    "data.source=embedded:colours", "data.max_rows=64", "data.max_test_rows=16", "data.validation=16",
    "data.images={flip: true}", "training.epochs=null", "training.steps=4", "training.global_batch=16",
    "training.micro_batch=8", "training.warmup=0", "evaluation.every=null",
]  # fmt: skip
TEXT = ["data.max_rows=64", "data.validation=4", "data.max_test_rows=4", "training.steps=4", "training.warmup=0"]
EVERY = ["adapter.slots=null", "merge.after_training=false", "output.save_every=2"]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory, alone: None) -> Path:
    """The folder of a random ViT."""
    folder = tmp_path_factory.mktemp("vit") / "model"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=7)).save_pretrained(folder)
    return folder


def resumed_and_merged(recipe: str, out: Path, *more: str) -> None:
    """Train at once and in two halves: the same bytes. Merge: the same answers. Count without weights: as trained."""
    run, halves = out / "run", out / "halves"
    assert train_in_process(recipe, *more, f"output.dir={run}") == 0
    train_in_process(recipe, *more, f"output.dir={halves}", "output.stop_after=2")
    assert not (halves / "adapter").exists()
    assert train_in_process(recipe, *more, f"output.dir={halves}") == 0
    whole, resumed = (load_file(place / "adapter" / "adapter_model.safetensors") for place in (run, halves))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert main(["merge", str(run), "--out", str(run / "merged"), "--dtype", "float32"]) == 0
    report = json.loads((run / "merged" / "merge_report.json").read_text())
    assert report["max_abs_logit_diff"] < 1e-5
    plan = make_plan(RunFolder(run).recipe())
    trained = json.loads((run / "summary.json").read_text())["trained_parameters"]
    assert parameters_of(plan, plan.recipe.adapter) == trained


@pytest.mark.parametrize("method", METHODS)
def test_a_vit(method: str, vit: Path, tmp_path: Path) -> None:
    more = [f"model.name_or_path={vit}", f"adapter.method={method}", *EVERY, *IMAGES]
    resumed_and_merged("vit_cifar10_glora", tmp_path, *more)
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "merged")
    base = AutoModelForImageClassification.from_pretrained(vit)
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
def test_a_llama_in_nf4_under_zero_3(method: str, argument: str, tmp_path: Path) -> None:
    """Without added biases, which the merged model then has none of."""
    kind = ["model.quantization=nf4", "training.deepspeed=zero3", f"adapter.peft={{{argument}: false}}"]
    resumed_and_merged("tiny_cpu", tmp_path, f"adapter.method={method}", *EVERY, *TEXT, *kind)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    assert not merged.config.attention_bias and not merged.config.mlp_bias
