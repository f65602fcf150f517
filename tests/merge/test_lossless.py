"""4 bits in, 4 bits out: not one code changes, and plain transformers computes what was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from glora_llm.cli.main import main
from glora_llm.errors import CheckFailed, UserError
from glora_llm.glora.frozen_weight import block_scales, dense_weight
from glora_llm.merge.command import merge_run
from glora_llm.merge.folder_writer import FolderWriter
from glora_llm.models.load import linear_names, load_base
from glora_llm.plan.overview import describe
from tests.merge.conftest import ALL_MODES, CPU, Train, Trained, logits

NF4 = {"quantization": "nf4", "dtype": "float32"}
SLOTS: list[dict[str, Any]] = [
    {"preset": "lossless4"},
    {"slots": {"A": "vector", "E": "scalar"}},
    {"slots": {"A": "scalar", "C": "lora"}},
    {"slots": {"C": "vector"}, "targets": ["q_proj", "down_proj"]},
    {"slots": {"A": "block"}, "modules_to_save": ["embed_tokens"]},
    {"preset": "lossless4", "paths": {r"mlp\.": {"A": "vector", "E": "vector"}, "k_proj": {"C": "vector"}}},
]


def plain(folder: Path) -> Any:
    """The folder as anybody's transformers loads it; no weight may be missing, left over or made up."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def codes(folder: Path) -> dict[str, torch.Tensor]:
    """Every packed 4-bit weight of a folder."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys())
            found |= {name: opened.get_tensor(name) for name in names if f"{name}.absmax" in names}
    return found


def base_codes(trained: Trained) -> dict[str, torch.Tensor]:
    base = load_base(trained.plan.recipe.model, trained.plan.base.folder, CPU)
    return {
        f"{name}.weight": base.get_submodule(name).weight.data.view(torch.uint8).reshape(-1, 1)
        for name in linear_names(base)
    }


@pytest.mark.parametrize("adapter", SLOTS, ids=lambda adapter: "-".join(map(str, adapter.values())))
def test_no_code_changes_and_plain_transformers_computes_the_same(
    adapter: dict[str, Any], train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = train(**({"rank": 1} | adapter), model=NF4)
    merge_run(trained.folder.path, tmp_path / "out", quantize="nf4_lossless")
    expected = base_codes(trained)
    found = codes(tmp_path / "out")
    assert found.keys() == expected.keys() and len(found) == 14
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    model = plain(tmp_path / "out")
    torch.testing.assert_close(logits(model), trained.logits(), rtol=1e-5, atol=1e-5)
    base = load_base(trained.plan.recipe.model, trained.plan.base.folder, CPU)
    assert (logits(base) - trained.logits()).abs().max() > 0.01
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    numbers = report["lossless"]
    assert numbers["codes_changed"] == 0 and numbers["codes"] == 2 * sum(value.numel() for value in found.values())
    assert 0 <= numbers["largest_weight_difference"] < 1e-6
    assert numbers["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert abs(report["loss_before"] - report["loss_after"]) < 1e-5 and report["top1_agreement"] == 1
    assert "nf4 without loss: 0 of" in capsys.readouterr().out
    assert not (tmp_path / "out.failed").exists()


def test_the_scales_alone_hold_what_was_trained(train: Train, tmp_path: Path) -> None:
    """The weight that plain transformers unpacks is (1 + G) W0 up to the rounding of one product."""
    trained = train(preset="lossless4", rank=1, model=NF4)
    merge_run(trained.folder.path, tmp_path / "out", quantize="nf4")  # where it can be, nf4 is without loss
    model, base = plain(tmp_path / "out"), load_base(trained.plan.recipe.model, trained.plan.base.folder, CPU)
    name = "model.layers.1.mlp.down_proj"
    down, up = (trained.state[f"master/base_model.model.{name}.slot_A.default.block_{k}"] for k in ("down", "up"))
    gains = (4.0 / 1 * down @ up).repeat_interleave(64, 1)
    w0 = dense_weight(base.get_submodule(name))
    torch.testing.assert_close(dense_weight(model.get_submodule(name)), (1 + gains) * w0, rtol=1e-5, atol=1e-7)
    assert gains.abs().max() > 0.01
    weight = model.get_submodule(name).weight
    assert weight.quant_state.absmax.dtype == torch.float32 and not weight.quant_state.nested
    assert block_scales(weight).shape == (w0.shape[0], w0.shape[1] // 64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_the_scales_in_float32(dtype: str, train: Train, tmp_path: Path) -> None:
    trained = train(preset="lossless4", rank=1, model=NF4 | {"dtype": "bfloat16"})
    merge_run(trained.folder.path, tmp_path / "out", quantize="nf4", dtype=dtype)
    model = plain(tmp_path / "out")
    weight = model.model.layers[0].mlp.down_proj.weight
    assert weight.quant_state.absmax.dtype == torch.float32 and str(weight.quant_state.dtype) == f"torch.{dtype}"
    assert str(model.dtype) == f"torch.{dtype}"
    torch.testing.assert_close(logits(model), trained.logits(), rtol=0.05, atol=0.1)


def test_sharded_files_and_no_comparison(train: Train, tmp_path: Path) -> None:
    trained = train(preset="lossless4", rank=1, model=NF4, merge={"max_shard_gb": 2e-5})
    merge_run(trained.folder.path, tmp_path / "out", quantize="nf4", compared=False)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    torch.testing.assert_close(logits(plain(tmp_path / "out")), trained.logits(), rtol=1e-5, atol=1e-5)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["lossless"]["codes_changed"] == 0 and "loss_after" not in report


def test_a_code_that_changed_is_found(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte of one weight is written otherwise: both of its codes are counted."""
    trained = train(preset="lossless4", rank=1, model=NF4)
    add = FolderWriter.add

    def spoiling(self: Any, name: str, tensor: torch.Tensor, keep_dtype: bool = False) -> None:
        if name == "model.layers.0.mlp.up_proj.weight":
            tensor = tensor.clone()
            tensor[3] ^= 0x11
        add(self, name, tensor, keep_dtype)

    monkeypatch.setattr(FolderWriter, "add", spoiling)
    with pytest.raises(CheckFailed, match=r"2 of \d+ 4-bit codes are not the base's"):
        merge_run(trained.folder.path, tmp_path / "out", quantize="nf4")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.failed").exists()


LOSSY = [
    ({"slots": ALL_MODES}, NF4, r"14 layers .* \(model\.layers\.0\.self_attn\.q_proj: A lora, B lora; .* 11 more"),
    ({"slots": {"B": "vector"}, "targets": ["k_proj"]}, NF4, r"2 layers .*k_proj: B vector"),
    ({"preset": "lossless4", "rank": 1}, {"quantization": "none"}, "was trained in model.quantization none"),
    ({"method": "lora"}, NF4, "adapter.method lora adds a matrix to W0"),
]  # fmt: skip


@pytest.mark.parametrize(("adapter", "model", "message"), LOSSY)
def test_what_would_lose_codes_is_refused_where_that_is_asked(
    adapter: dict[str, Any], model: dict[str, Any], message: str, train: Train, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trained = train(**adapter, model=model)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=message):
        merge_run(trained.folder.path, out, quantize="nf4_lossless")
    assert main(["merge", str(trained.folder.path), "--out", str(out), "--quantize", "nf4_lossless"]) == 2
    assert "Train with adapter.preset=lossless4 on model.quantization=nf4" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_lossy_slots_are_quantised_again_and_the_report_says_why(train: Train, tmp_path: Path) -> None:
    trained = train(slots=ALL_MODES, model=NF4, merge={"min_nf4_top1_agreement": 0.0})
    merge_run(trained.folder.path, tmp_path / "out", quantize="nf4")
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert "A lora, B lora" in report["not_lossless"] and "requantised" in report and "lossless" not in report
    assert not all(torch.equal(codes(tmp_path / "out")[name], value) for name, value in base_codes(trained).items())


def test_a_recipe_that_demands_it_is_refused_at_the_dry_run(train: Train) -> None:
    asked = {"quantize": "nf4_lossless"}
    describe(train(preset="lossless4", rank=1, model=NF4, merge=asked).plan)
    with pytest.raises(UserError, match=r"merge\.quantize is nf4_lossless, and slots of 14 layers change more"):
        describe(train(slots=ALL_MODES, model=NF4, merge=asked).plan)
