"""Loading under ZeRO 3, on a process group of one: the same weights, each divided before the next one is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from glora_llm.errors import UserError
from glora_llm.models import sharded_load
from glora_llm.models.folder import new_config, new_folder
from glora_llm.models.load import linear_names, load_base
from glora_llm.models.resolve import ResolvedModel
from glora_llm.models.sharded_load import Shards
from glora_llm.schema import ModelSection, VLoRASection
from tests.in_process import alone, group

__all__ = ["alone", "group"]
pytestmark = pytest.mark.usefixtures("group")
CPU = torch.device("cpu")
ZERO3 = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 60,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


class Watched(Shards):
    """Notes which parameters are whole when the next one is divided."""

    def __init__(self) -> None:
        super().__init__(ZERO3)
        self.divided: list[nn.Parameter] = []
        self.events: list[str] = []

    def divide(self, parameter: nn.Parameter) -> None:
        if not hasattr(parameter, "ds_id"):
            assert all(earlier.numel() == 0 for earlier in self.divided), "an earlier one is whole again"
            self.divided.append(parameter)
            self.events.append("divided")
        super().divide(parameter)


def values(model: PreTrainedModel) -> dict[str, bytes]:
    """Name -> bytes of a parameter, whole: on one process the part of a divided one is all of it."""
    parts = {name: getattr(value, "ds_tensor", value.detach()) for name, value in model.named_parameters()}
    return {name: part.contiguous().view(torch.uint8).numpy().tobytes() for name, part in parts.items()}


def require_same(divided: PreTrainedModel, whole: PreTrainedModel) -> None:
    assert values(divided) == values(whole)
    assert all(hasattr(value, "ds_id") and value.numel() == 0 for value in divided.parameters())
    assert not any(value.requires_grad for value in divided.parameters()) and not divided.training
    for (name, got), (_, expected) in zip(divided.named_buffers(), whole.named_buffers(), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected), name
    assert divided.name_or_path == whole.name_or_path and divided.config.use_cache is False


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4"])
def test_the_weights_are_those_of_an_undivided_load(quantization: Any, dtype: Any, tiny: ResolvedModel) -> None:
    section = ModelSection(name_or_path="x", quantization=quantization, dtype=dtype)
    divided, whole = load_base(section, tiny.folder, CPU, Shards(ZERO3)), load_base(section, tiny.folder, CPU)
    require_same(divided, whole)
    for name in linear_names(whole) if quantization != "none" else ():
        states = [model.get_submodule(name).weight.quant_state.as_dict() for model in (divided, whole)]
        for key, value in states[1].items():
            same = torch.equal(states[0][key], value) if isinstance(value, torch.Tensor) else states[0][key] == value
            assert same, (name, key)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_each_weight_is_divided_before_the_next_is_read(
    quantization: Any, tiny: ResolvedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, stored = Watched(), sharded_load.stored_tensors(tiny.folder)

    class Noted:
        def __init__(self, tensor: Any):
            self.tensor = tensor

        def __getitem__(self, index: Any) -> torch.Tensor:
            shards.events.append("read")
            return self.tensor[index]

    def refuse(*_: Any) -> None:
        raise AssertionError("transformers would reserve the whole model's memory on a GPU")

    monkeypatch.setattr(sharded_load, "stored_tensors", lambda _: {name: Noted(t) for name, t in stored.items()})
    monkeypatch.setattr(transformers.modeling_utils, "caching_allocator_warmup", refuse)
    load_base(ModelSection(name_or_path="x", quantization=quantization), tiny.folder, CPU, shards)
    assert shards.events == ["read", "divided"] * len(stored) and len(stored) > 20


def new(tmp_path: Path, vlora: VLoRASection | None = None) -> Path:
    section = ModelSection(config=CONFIG)
    return new_folder(new_config(section, "text", {}), vlora, 3, "none", lambda folder: None)[0]


@pytest.mark.parametrize("vlora", [None, VLoRASection(layers_per_compound=2, rank=4, start="kaiming")])
def test_a_new_model_is_drawn_as_always(vlora: VLoRASection | None, tmp_path: Path) -> None:
    folder, section = new(tmp_path, vlora), ModelSection(name_or_path="x", dtype="bfloat16")
    shards = Watched()
    divided = load_base(section, folder, CPU, shards)
    require_same(divided, load_base(section, folder, CPU))
    assert divided.lm_head.weight is divided.model.embed_tokens.weight
    assert len(shards.divided) == len(list(divided.parameters()))


@pytest.mark.parametrize("vlora", [None, VLoRASection(layers_per_compound=2, rank=4, start="kaiming")])
def test_a_process_that_draws_nothing_has_the_same_model(vlora: VLoRASection | None, tmp_path: Path) -> None:
    """Its values come from the main process; here names, shapes, ties and buffers are looked at."""
    folder, section, shards = new(tmp_path, vlora), ModelSection(name_or_path="x"), Shards(ZERO3)
    shards.is_main_process = False
    generator = torch.get_rng_state()
    other, whole = load_base(section, folder, CPU, shards), load_base(section, folder, CPU)
    assert torch.equal(torch.get_rng_state(), generator)
    assert {n: p.ds_shape for n, p in other.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert all(torch.equal(got, want) for got, want in zip(other.buffers(), whole.buffers(), strict=True))


def test_stored_shared_weights(tmp_path: Path) -> None:
    folder, section = new(tmp_path, VLoRASection(layers_per_compound=2, rank=4)), ModelSection(name_or_path="x")
    stored = tmp_path / "stored"
    stored.mkdir()
    for name in ("config.json", "vlora.json"):
        (stored / name).write_bytes((folder / name).read_bytes())
    weights = {name: torch.randn_like(value) for name, value in load_base(section, folder, CPU).named_parameters()}
    save_file(weights, stored / "model.safetensors")
    require_same(load_base(section, stored, CPU, Shards(ZERO3)), load_base(section, stored, CPU))


@pytest.mark.parametrize("alike", [True, False])
def test_stored_twice_and_tied_only_where_alike(alike: bool, tiny_copy: Path) -> None:
    config = json.loads((tiny_copy / "config.json").read_text())
    (tiny_copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    if alike:
        weights = load_file(tiny_copy / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, tiny_copy / "model.safetensors", metadata={"format": "pt"})
    section = ModelSection(name_or_path="x")
    divided, whole = load_base(section, tiny_copy, CPU, Shards(ZERO3)), load_base(section, tiny_copy, CPU)
    require_same(divided, whole)
    assert (divided.lm_head.weight is divided.model.embed_tokens.weight) is alike


def test_a_missing_tensor_is_not_made_up(tiny_copy: Path) -> None:
    weights = load_file(tiny_copy / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tiny_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors .* lm_head\.weight"):
        load_base(ModelSection(name_or_path="x"), tiny_copy, CPU, Shards(ZERO3))
