"""Bottleneck adapters and their fusion as whole runs of heads: on a ViT, and on a LLaMA with classes."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from glora_llm.cli import main
from tests.in_process import alone, one_thread, train_in_process
from tests.run.test_module_methods import EVERY, IMAGES, TEXT, vit

__all__ = ["alone", "one_thread", "vit"]


def trained(recipe: str, out: Path, *more: str) -> str:
    assert train_in_process(recipe, *more, *EVERY, f"output.dir={out}") == 0
    return str(out / "adapter")


def fused_and_resumed(recipe: str, method: str, out: Path, *more: str) -> None:
    """Train two adapters; fuse them at once and in two halves: the same bytes. The fusion is scored."""
    one = trained(recipe, out / "one", f"adapter.method={method}", *more)
    two = trained(recipe, out / "two", f"adapter.method={method}", "training.seed=1", *more)
    fusion = ["adapter.method=adapter_fusion", f"adapter.peft={{adapters: [{one}, {two}]}}", *more]
    whole = trained(recipe, out / "whole", *fusion)
    train_in_process(recipe, *fusion, *EVERY, f"output.dir={out / 'halves'}", "output.stop_after=2")
    halves = trained(recipe, out / "halves", *fusion)
    files = [Path(folder) / "adapter_model.safetensors" for folder in (whole, halves)]
    assert files[0].read_bytes() == files[1].read_bytes()
    names = load_file(files[0]).keys()
    assert any("fusion_frozen" in name for name in names) and any("score" in n or "classifier" in n for n in names)
    shutil.rmtree(out / "one")
    assert main(["evaluate", str(out / "whole"), "--split", "test"]) == 0


@pytest.mark.slow
def test_a_vit(vit: Path, tmp_path: Path) -> None:
    fused_and_resumed("vit_cifar10_glora", "adaptformer", tmp_path, f"model.name_or_path={vit}", *IMAGES)


@pytest.mark.slow
def test_classes_of_text(tmp_path: Path) -> None:
    fused_and_resumed("tiny_cpu", "pfeiffer", tmp_path, "task=classification", *TEXT)
