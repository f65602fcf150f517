"""Merges of int8 runs are judged by the weights, not by the rounding of activations that no merged model repeats."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glora_llm.cli import main
from glora_llm.evaluation.trained import load_adapted, stream_adapted
from glora_llm.merge import lora_export, verify
from glora_llm.merge.layers import AdapterLayers
from tests.merge.conftest import CPU, Train, Trained, logits

# Tight enough that the rounding of activations, which is 1e-2 here, fails.
TIGHT = {"dtype": "float32", "min_top1_agreement": 1.0, "max_loss_change": 1e-5}
ADAPTERS: dict[str, dict[str, Any]] = {
    "glora": {"slots": {"A": "lora", "B": "lora"}},
    "lora": {"method": "lora"},
}


def trained_int8(train: Train, adapter: str) -> Trained:
    return train(targets=["q_proj", "v_proj"], model={"quantization": "int8"}, merge=TIGHT, **ADAPTERS[adapter])


@pytest.mark.parametrize("whole", [False, True], ids=["by layers", "whole"])
@pytest.mark.parametrize(("adapter", "to"), [("glora", "model"), ("glora", "lora"), ("lora", "model")])
def test_a_right_merge_passes(
    adapter: str,
    to: str,
    whole: bool,
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained = trained_int8(train, adapter)
    if whole:
        monkeypatch.setattr(verify, "stream_adapted", lambda *_: None)
    assert main(["merge", str(trained.folder.path), "--out", str(tmp_path / "out"), "--to", to]) == 0
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["max_abs_logit_diff"] < 1e-4
    rounded = report["int8"]
    assert rounded["max_abs_logit_diff"] > 1e-3 and abs(rounded["loss_after"] - rounded["loss_before"]) > 1e-5
    assert ("int8_exported" in report) == (to == "lora")
    assert "for itself, the trained int8 model (its linears round their inputs)" in capsys.readouterr().out


def test_a_broken_merge_fails(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = trained_int8(train, "glora")
    monkeypatch.setattr(AdapterLayers, "merged", lambda self, name, w0, b0: (w0, b0))  # the base alone
    assert main(["merge", str(trained.folder.path), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "top-1 agreement 0." in said and "rounding is not the cause: the result is wrong" in said
    assert [file.name for file in tmp_path.iterdir()] == ["out.failed"]


def test_a_broken_export_fails(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = trained_int8(train, "glora")
    right = lora_export.as_lora

    def half(w0: Tensor, b0: Tensor | None, slots: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        up, down, bias = right(w0, b0, slots)
        return up, down / 2, bias

    monkeypatch.setattr(lora_export, "as_lora", half)
    assert main(["merge", str(trained.folder.path), "--out", str(tmp_path / "out"), "--to", "lora"]) == 1
    said = capsys.readouterr().err
    assert "rounding is not the cause: the result is wrong" in said and "--dtype" not in said


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_unpacked_weights_are_the_trained_ones(quantization: str, train: Train) -> None:
    """Layer by layer or whole; a 4-bit linear computes with the unpacked weight anyway."""
    trained = train(targets=["q_proj", "v_proj"], model={"quantization": quantization}, **ADAPTERS["glora"])
    place = (trained.plan, trained.folder.adapter)
    streamed = logits(stream_adapted(*place, CPU, trained.dtype, "", True))
    assert torch.equal(streamed, logits(load_adapted(*place, trained.dtype, False, True)))
    as_trained = logits(load_adapted(*place, trained.dtype))
    difference = float((streamed - as_trained).abs().max())
    assert difference > 1e-3 if quantization == "int8" else difference < 1e-5
