"""Runs of methods that learn a prompt: each under a ZeRO stage, resumed bit for bit, scored, and not merged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glora_llm.cli import main
from tests.in_process import alone, one_thread, train_in_process

__all__ = ["alone", "one_thread"]
TEXT = [
    "adapter.slots=null", "training.steps=4", "training.warmup=0", "data.max_rows=64", "data.validation=4",
    "data.max_test_rows=8", "model.gradient_checkpointing=true",
]  # fmt: skip
IMAGES = [
    "data.max_rows=64", "data.max_test_rows=32", "data.validation=16", "training.steps=4", "training.epochs=null",
    "training.global_batch=16", "training.micro_batch=8", "training.warmup=0", "evaluation.every=null",
    "merge.after_training=false", "vlora=null",
]  # fmt: skip


def train_in_halves(recipe: str, arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train at once, and in two launches; compare the adapters and the scores, and score the saved adapter again."""
    whole, halves = out / "whole", out / "halves"
    assert train_in_process(recipe, *arguments, f"output.dir={whole}") == 0
    train_in_process(recipe, *arguments, f"output.dir={halves}", "output.stop_after=2")
    assert not (halves / "adapter").exists()
    assert train_in_process(recipe, *arguments, f"output.dir={halves}") == 0
    weights, again = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, halves))
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["test"] == json.loads((halves / "summary.json").read_text())["test"]
    capsys.readouterr()
    assert main(["evaluate", str(whole), "--split", "test"]) == 0
    assert f"{summary['test']['test/loss']:.4f}" in capsys.readouterr().out
    assert main(["merge", str(whole), "--out", str(out / "merged")]) == 2
    assert "cannot be merged: its prompt" in capsys.readouterr().err and not (out / "merged").exists()


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("prompt_tuning", ["training.deepspeed=zero1", "model.quantization=nf4"]),
        ("p_tuning", ["training.deepspeed=zero3"]),
        pytest.param("prefix_tuning", ["training.deepspeed=zero2"], marks=pytest.mark.slow),
        pytest.param("p_tuning_v2", ["training.deepspeed=zero3"], marks=pytest.mark.slow),
    ],
)
def test_prompts_of_a_language_model(
    method: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in_halves("tiny_cpu", [*TEXT, f"adapter.method={method}", "output.save_every=2", *more], tmp_path, capsys)


def test_prompts_of_a_vit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base is trained on shapes as a whole, the prompts and a new head on colours."""
    base = tmp_path / "base"
    assert train_in_process("vit_cifar10_vlora_tiny", *IMAGES, f"output.dir={base}") == 0
    section = "adapter={method: vpt, peft: {num_tokens: 5, dropout: 0.1}}"
    more = [f"model.name_or_path={base / 'model'}", "model.config=null", "data.source=embedded:colours", section]
    arguments = [*IMAGES, *more, "output.save_every=2", "training.deepspeed=zero2", "model.quantization=nf4"]
    train_in_halves("vit_cifar10_vlora_tiny", arguments, tmp_path, capsys)
