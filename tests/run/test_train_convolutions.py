"""Convolutions as bases of GLoRA: a ResNet, and the patch embedding of a ViT; each trains, resumes and merges."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from glora_llm.cli import main
from tests.in_process import alone, one_thread, train_in_process

__all__ = ["alone", "one_thread"]
SMALL = [
    "data.source=embedded:colours", "data.test=test", "data.images={size: 16}", "data.max_rows=96",
    "data.validation=32", "data.max_test_rows=32", "training.epochs=null", "training.steps=4",
    "training.global_batch=16", "training.micro_batch=8", "training.warmup=0", "training.schedule=constant",
    "evaluation.every=null", "output.save_every=2",
]  # fmt: skip
SLOTS = {"resnet": "{A: lora, B: lora}", "vit": "{A: lora, B: lora, C: vector, D: vector, E: vector}"}
TARGETS = {"resnet": "[convolution]", "vit": "[projection, q_proj]"}


def base_model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "vit":
        sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=3, **sizes))
    model = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    )
    for name, buffer in model.named_buffers():  # statistics as of a trained model
        if name.endswith("running_mean"):
            buffer.normal_(0.0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    return model


@pytest.fixture
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    base_model(request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(("kind", "base"), [("resnet", "resnet"), ("vit", "vit")], indirect=["base"])
def test_it_trains_resumes_and_merges(kind: str, base: Path, tmp_path: Path) -> None:
    run, halves = tmp_path / "run", tmp_path / "halves"
    more = [f"model.name_or_path={base}", *SMALL, f"adapter.targets={TARGETS[kind]}", f"adapter.slots={SLOTS[kind]}",
            "adapter.rank=2"]  # fmt: skip
    assert train_in_process("vit_cifar10_glora", *more, f"output.dir={run}") == 0
    report = json.loads((run / "merged" / "merge_report.json").read_text())
    assert report["max_abs_logit_diff"] < 1e-5 and report["tokens"] == 32

    train_in_process("vit_cifar10_glora", *more, f"output.dir={halves}", "output.stop_after=2")
    assert train_in_process("vit_cifar10_glora", *more, f"output.dir={halves}") == 0
    one, other = (load_file(place / "adapter" / "adapter_model.safetensors") for place in (run, halves))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    adapted = [name for name in one if ".slot_A." in name]
    assert len(adapted) == 2 * (6 if kind == "resnet" else 2)

    plain = AutoModelForImageClassification.from_pretrained(run / "merged")
    before, after = AutoModelForImageClassification.from_pretrained(base).state_dict(), plain.state_dict()
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert all(name in same for name in before if "running" in name or "num_batches" in name)
    changed = "embedder.embedder.convolution.weight" if kind == "resnet" else "patch_embeddings.projection.weight"
    assert any(name.endswith(changed) and name not in same for name in before)
    assert plain.config.id2label == {0: "red", 1: "green", 2: "blue", 3: "yellow"}


@pytest.mark.parametrize("base", ["resnet"], indirect=True)
def test_what_a_resnet_refuses(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*more: str) -> str:
        options = [f"model.name_or_path={base}", *SMALL, *more, f"output.dir={tmp_path / 'run'}", "--dry-run"]
        assert main(["train", "--recipe", "vit_cifar10_glora", *options]) == 2
        return capsys.readouterr().err

    assert "its convolutions are called convolution: adapter.targets=[convolution]" in refused()
    targets = "adapter.targets=[convolution]"
    said = refused(targets)  # the recipe's slots C and E, and a merge after training
    assert "slots C and E give a bias to convolution, and a resnet model of plain transformers has none there" in said
    assert "is a BatchNorm2d" in refused("adapter.targets=[normalization]")
    assert "which 64 does not divide" in refused(targets, "adapter.slots={A: block}")
