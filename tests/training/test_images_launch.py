"""A VLoRA ViT on two gloo ranks: stages and ranks agree, a resumed run is the whole one, the merged model is plain."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glora_llm.cli import main
from glora_llm.evaluation.trained import load_adapted
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from tests.training.launching import finished, launch, metrics

pytestmark = pytest.mark.launch
WORKER = "tests/training/images_worker.py"
EXACT = ("train/loss", "train/lr", "train/grad_norm", "validation/loss", "validation/accuracy")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The run folders of every scenario of images_worker.py: by two ranks, and in `alone` by one."""
    out = tmp_path_factory.mktemp("images")
    for ranks, folder in ((2, out), (1, out / "alone")):
        done = finished(launch(WORKER, str(folder), ranks=ranks))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return out


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_every_stage_follows_stage_zero(images: Path, name: str) -> None:
    for key in ("train/loss", "train/grad_norm", "validation/loss"):
        expected, got = metrics(images / "zero0", key), metrics(images / name, key)
        assert len(expected) >= 1
        assert got == pytest.approx(expected, rel=2e-5), key


@pytest.mark.parametrize("name", ["zero0", "zero2", "varied"])
def test_two_ranks_learn_what_one_rank_accumulates(images: Path, name: str) -> None:
    """Also with images that are varied: what happens to one depends on its place in the step, not on its rank."""
    for key in ("train/loss", "train/grad_norm", "validation/loss"):
        expected, got = metrics(images / "alone" / name, key), metrics(images / name, key)
        assert len(expected) >= 1
        assert got == pytest.approx(expected, rel=2e-5), key
    one, two = (load_file(place / name / "model" / "model.safetensors") for place in (images / "alone", images))
    assert one.keys() == two.keys()
    for tensor in one:
        torch.testing.assert_close(two[tensor], one[tensor], rtol=1e-3, atol=2e-4)


def test_images_are_varied_in_these_runs(images: Path) -> None:
    plain, varied = (metrics(images / name, "train/loss")[1] for name in ("zero2", "varied"))
    assert plain != pytest.approx(varied, abs=5e-3)


@pytest.mark.parametrize("name", ["zero3", "varied", "bfloat16", "zero3_bfloat16"])
def test_a_resumed_run_is_the_uninterrupted_one(images: Path, name: str) -> None:
    """Bit for bit, crops, mixtures and all."""
    for key in EXACT:
        whole, resumed = metrics(images / name, key), metrics(images / f"{name}-resumed", key)
        assert resumed and resumed == {step: value for step, value in whole.items() if step > 3}, key
    whole_model, again = (
        (images / run / "model" / "model.safetensors").read_bytes() for run in (name, f"{name}-resumed")
    )
    assert whole_model == again


def test_the_merged_model_is_a_plain_one_with_the_same_logits(images: Path, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    folder = RunFolder(images / "varied")
    assert main(["merge", str(folder.path), "--out", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["tokens"] == 32 and report["max_abs_logit_diff"] < 1e-5 and report["top1_agreement"] == 1
    plan = make_plan(folder.recipe())
    trained, plain = (
        load_adapted(plan, folder.model),
        AutoModelForImageClassification.from_pretrained(tmp_path / "merged"),
    )
    pictures = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(pictures).logits, trained(pictures).logits, rtol=1e-4, atol=1e-5)
    assert plain.config.id2label[5] == "checks"
    assert AutoImageProcessor.from_pretrained(tmp_path / "merged").size["height"] == 16
    saved = sum(value.numel() for value in load_file(folder.model / "model.safetensors").values())
    assert saved == json.loads((folder.path / "summary.json").read_text())["trained_parameters"]
    assert saved < 0.7 * sum(value.numel() for value in plain.parameters())
