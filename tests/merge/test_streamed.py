"""A model that is read layer by layer answers as the one that is loaded whole, and merges say the same of both."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from glora_llm.evaluation import trained as loading
from glora_llm.evaluation.scoring import score_model
from glora_llm.evaluation.streamed import hollow_model
from glora_llm.evaluation.trained import fits, load_adapted, load_merged, stream_adapted, stream_merged, weight_bytes
from glora_llm.merge import verify
from glora_llm.merge.command import merge_run
from glora_llm.merge.layers import merge_device
from glora_llm.merge.sample import comparison_batches
from glora_llm.models.load import load_base
from glora_llm.models.resolve import ResolvedModel
from glora_llm.models.stored import StoredTensors
from glora_llm.schema import ModelSection
from tests.merge.conftest import ALL_MODES, CPU, Train, Trained, logits
from tests.merge.test_families import CASES as FAMILIES
from tests.merge.test_families import Folders, folders
from tests.merge.test_model_merge import CASES, merge

__all__ = ["folders"]
HEAD = {"targets": ["lm_head", "q_proj"], "model": {"quantization": "int8"}}
MORE: dict[str, dict[str, Any]] = {
    "the head, GLoRA on int8": {"slots": {"A": "lora", "B": "lora"}, **HEAD},
    "the head, LoRA on int8": {"method": "lora", **HEAD},
}
EVERY = CASES | MORE


def require_alike(found: Tensor, expected: Tensor, where: torch.device) -> None:
    """The same products in the same order: equal on the CPU; a GPU may choose another kernel."""
    if where.type == "cpu":
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


def matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for name, p in model.named_parameters() if p.dim() > 1 and "slot_" not in name)


@pytest.mark.parametrize("name", EVERY)
def test_streamed_equals_whole(name: str, train: Train, here: torch.device) -> None:
    trained = train(**EVERY[name])
    whole = load_adapted(trained.plan, trained.folder.adapter, trained.dtype)
    streamed = stream_adapted(trained.plan, trained.folder.adapter, here, trained.dtype)
    require_alike(logits(streamed), logits(whole), here)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(("family", "adapter"), FAMILIES)
def test_families_stream(
    family: str, adapter: dict[str, Any], quantization: str, folders: Folders, train: Train, tmp_path: Path
) -> None:
    trained = train(model={"name_or_path": folders[family], "quantization": quantization}, **adapter)
    assert torch.equal(logits(stream_adapted(trained.plan, trained.folder.adapter, CPU)), trained.logits())
    out = merge(trained, tmp_path / "out")
    assert torch.equal(logits(stream_merged(out, CPU)), logits(load_merged(out)))


def test_one_layer_is_in_memory_at_a_time(train: Train) -> None:
    """Every matrix is one number, but those of the layer that computes."""
    trained = train(slots=ALL_MODES)
    model = stream_adapted(trained.plan, trained.folder.adapter, CPU)
    assert model is not None and len(list(matrices(model))) == 16
    held: list[int] = []

    def count(*_: Any) -> None:
        held.append(sum(p.untyped_storage().nbytes() > 4 for p in matrices(model)))

    count()
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(count)
    logits(model)
    count()
    assert held == [0, 7, 7, 0]


def test_a_model_is_read_once_for_a_comparison(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = train(slots=ALL_MODES)
    merge_run(trained.folder.path, tmp_path / "out")
    read: list[str] = []
    get = StoredTensors.get

    def counted(stored: StoredTensors, name: str) -> Tensor:
        read.append(name)
        return get(stored, name)

    monkeypatch.setattr(StoredTensors, "get", counted)
    batches, _ = comparison_batches(trained.plan, trained.folder)
    verify.answers(lambda: verify.merged_model(tmp_path / "out"), trained.plan.task, batches)
    assert "model.layers.1.mlp.up_proj.weight" in read and len(read) == len(set(read))


def test_a_folder_of_other_names_is_loaded_whole(plain: Trained, tmp_path: Path) -> None:
    out = merge(plain, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert hollow_model(out, torch.float32, CPU) is None and stream_merged(out, CPU) is None


@pytest.fixture(scope="module")
def plain(train: Train) -> Trained:
    return train(slots=ALL_MODES, data={"test": 3})


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_verified_by_layers_or_whole(
    quantization: str, train: Train, tmp_path: Path, here: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train(slots=ALL_MODES, model={"quantization": quantization})
    merge_run(trained.folder.path, tmp_path / "streamed")
    for name in ("stream_adapted", "stream_merged"):
        monkeypatch.setattr(verify, name, lambda *_: None)
    merge_run(trained.folder.path, tmp_path / "whole")
    streamed, whole = (json.loads((tmp_path / way / "merge_report.json").read_text()) for way in ("streamed", "whole"))
    assert streamed.pop("latency").keys() == whole.pop("latency").keys()
    assert streamed.pop("text") == whole.pop("text") and whole["max_abs_logit_diff"] < 1e-3
    assert streamed == (whole if here.type == "cpu" else pytest.approx(whole, abs=1e-3))


@pytest.mark.parametrize("composition", ["product", "hadamard"])
def test_the_arithmetic_is_the_cpu_s(
    composition: str, train: Train, tmp_path: Path, here: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    trained = train(slots=ALL_MODES, composition=composition, model={"quantization": "nf4"})
    assert merge_device(1000) == here
    found = load_file(merge(trained, tmp_path / "here") / "model.safetensors")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    expected = load_file(merge(trained, tmp_path / "cpu") / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_a_merged_model_scores_as_the_adapted_one(plain: Trained, tmp_path: Path, here: torch.device) -> None:
    merge_run(plain.folder.path, tmp_path / "out", dtype="float32")
    model = load_merged(tmp_path / "out")
    assert model.device == here
    adapted = load_adapted(plain.plan, plain.folder.adapter, plain.dtype)
    expected = score_model(plain.plan, adapted, "test")
    assert score_model(plain.plan, model, "test") == pytest.approx(expected, rel=1e-4)
    streamed = stream_merged(tmp_path / "out", here)
    assert score_model(plain.plan, streamed, "test") == pytest.approx(expected, rel=1e-4)


def test_weights_of_a_gpu_s_size_are_streamed(plain: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 0.8 of the free memory: by layers; with gradients, or where that is impossible, on the CPU."""
    out = merge(plain, tmp_path / "out")
    size = weight_bytes(plain.plan.recipe.model, plain.plan.base.folder, CPU)
    expected = plain.logits()
    chosen: list[str] = []
    stream, merged = stream_adapted, stream_merged

    def load_on_cpu(section: Any, folder: Path, where: torch.device) -> Any:
        chosen.append(f"whole on {where.type}")
        return load_base(section, folder, CPU)

    def stream_on_cpu(load: Any, first: Any, *rest: Any) -> Any:
        chosen.append("by layers")
        return load(first, *(CPU if isinstance(value, torch.device) else value for value in rest))

    monkeypatch.setattr(loading, "load_base", load_on_cpu)
    monkeypatch.setattr(loading, "stream_adapted", partial(stream_on_cpu, stream))
    monkeypatch.setattr(loading, "stream_merged", partial(stream_on_cpu, merged))
    monkeypatch.setattr(loading, "choose_device", lambda: torch.device("cuda", 0))
    for free, gradients, way in (
        (1.3 * size, False, "whole on cuda"),
        (1.2 * size, False, "by layers"),
        (1.2 * size, True, "whole on cpu"),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (int(free), 2**40))
        assert fits(size, torch.device("cuda", 0)) == (way == "whole on cuda") and fits(size, CPU)
        found = load_adapted(plain.plan, plain.folder.adapter, torch.float32, gradients)
        assert chosen.pop() == way and not chosen
        torch.testing.assert_close(logits(found), expected)
    assert torch.equal(logits(load_merged(out)), logits(AutoModelForCausalLM.from_pretrained(out).eval()))
    assert chosen == ["by layers"]


def test_the_bytes_of_quantised_weights(tiny: ResolvedModel) -> None:
    sizes = [
        weight_bytes(ModelSection(name_or_path="x", quantization=kind), tiny.folder, CPU)  # type: ignore[arg-type]
        for kind in ("none", "int8", "nf4")
    ]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[0] / 8
