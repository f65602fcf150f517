"""Convolutions as bases of GLoRA: a ResNet, and the patch embedding of a ViT; each trains, resumes and merges."""

from functools import partial
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
from tests.in_process import alone, one_thread
from tests.run.methods_walk import PIXELS, Kind, Walker

__all__ = ["alone", "one_thread"]
SMALL = [
    "data.source=embedded:colours", "data.test=test", "data.images={size: 16}", "training.epochs=null",
    "training.global_batch=16", "training.micro_batch=8",
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


def make(kind: str, folder: Path) -> None:
    base_model(kind).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_it_trains_resumes_and_merges(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = Kind(
        "vit_cifar10_glora", SMALL, AutoModelForImageClassification, PIXELS, partial(make, kind), claimed="images"
    )
    more = [f"adapter.targets={TARGETS[kind]}", f"adapter.slots={SLOTS[kind]}", "adapter.rank=2"]
    run = Walker(images, tmp_path).walk("glora", tmp_path, capsys, *more)
    adapted = [name for name in load_file(run / "adapter" / "adapter_model.safetensors") if ".slot_A." in name]
    assert len(adapted) == 2 * (6 if kind == "resnet" else 2)

    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    before = AutoModelForImageClassification.from_pretrained(tmp_path / "base").state_dict()
    after = plain.state_dict()
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert all(name in same for name in before if "running" in name or "num_batches" in name)
    changed = "embedder.embedder.convolution.weight" if kind == "resnet" else "patch_embeddings.projection.weight"
    assert any(name.endswith(changed) and name not in same for name in before)
    assert plain.config.id2label == {0: "red", 1: "green", 2: "blue", 3: "yellow"}


def test_what_a_resnet_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    make("resnet", base)

    def refused(*more: str) -> str:
        rows = ["data.max_rows=96", "data.validation=32", "training.steps=4", "training.warmup=0"]
        options = [f"model.name_or_path={base}", *SMALL, *rows, *more, f"output.dir={tmp_path / 'run'}", "--dry-run"]
        assert main(["train", "--recipe", "vit_cifar10_glora", *options]) == 2
        return capsys.readouterr().err

    assert "its convolutions are called convolution: adapter.targets=[convolution]" in refused()
    targets = "adapter.targets=[convolution]"
    said = refused(targets)  # the recipe's slots C and E, and a merge after training
    assert "slots C and E give a bias to convolution, and a resnet model of plain transformers has none there" in said
    assert "is a BatchNorm2d" in refused("adapter.targets=[normalization]")
    assert "which 64 does not divide" in refused(targets, "adapter.slots={A: block}")
