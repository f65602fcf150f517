"""A run in even scaling with `training.lr: auto`, on nf4: its numbers are kept, resumed with, evaluated and merged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glora_llm.cli import main
from glora_llm.plan.run_folder import AUTO_RATE
from tests.in_process import alone, one_thread, train_in_process
from tests.run.test_train import overrides, write_rows

__all__ = ["alone", "one_thread"]
EVEN = ["adapter.scaling=even", "training.lr=auto", "model.quantization=nf4", "evaluation.every=null"]


def scales(adapter: Path) -> dict[str, dict[str, dict[str, float]]]:
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["scaling"] == "even"
    found: dict[str, dict[str, dict[str, float]]] = config["scales"]
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("even")
    settings = overrides(write_rows(folder / "data.jsonl"), folder / "run")
    assert train_in_process("tiny_cpu", *settings, *EVEN) == 0
    return folder / "run"


def test_the_number_and_its_reason_are_kept(run: Path) -> None:
    kept = json.loads((run / AUTO_RATE).read_text())
    assert "for the width 64" in kept["reason"] and "even scaling" in kept["reason"]
    assert f"lr: {kept['lr']}" in (run / "recipe.yaml").read_text()


def test_scales_are_of_the_weight_in_four_bits(run: Path) -> None:
    from glora_llm.adapters.even import even_scales
    from glora_llm.adapters.inject import inject
    from glora_llm.models.load import load_base
    from glora_llm.models.resolve import resolve
    from glora_llm.plan.run_folder import RunFolder

    recipe = RunFolder(run).recipe()
    base = load_base(recipe.model, resolve(recipe.model).folder, torch.device("cpu"))
    assert scales(run / "adapter") == even_scales(inject(base, recipe.adapter, 0, 1))
    assert len(scales(run / "adapter")) == 14


def test_a_resumed_run_keeps_rate_and_scales(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a newer release would take another number: bit for bit as the uninterrupted run."""
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "step-2")
    shutil.rmtree(again / "adapter")
    (again / "summary.json").unlink()
    monkeypatch.setattr("glora_llm.adapters.auto_rate.BASE_RATE", 1.0)
    monkeypatch.setattr("glora_llm.adapters.even.CONSTANTS", {("A", "lora"): 5.0})
    settings = overrides(run.parent / "data.jsonl", again)
    assert train_in_process("tiny_cpu", *settings, *EVEN) == 0
    whole, resumed = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, again))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert scales(again / "adapter") == scales(run / "adapter")


def test_the_merged_model_computes_the_same(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(run), "--out", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["max_abs_logit_diff"] < 1e-4, capsys.readouterr().out


def test_weights_of_another_scaling_are_no_start(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = overrides(run.parent / "data.jsonl", tmp_path / "run")
    assert main(["train", "--recipe", "tiny_cpu", *settings, f"adapter.weights={run / 'adapter'}"]) == 2
    assert "was trained with scaling even, and this recipe has alpha" in capsys.readouterr().err
