"""W0 as training saw it, from the base's files, tensor by tensor."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glora_llm.glora.frozen_weight import compute_dtype, dense_weight
from glora_llm.merge.frozen import trained_weight
from glora_llm.models.load import linear_names, load_base
from glora_llm.models.resolve import ResolvedModel
from glora_llm.models.stored import StoredTensors
from glora_llm.schema import ModelSection

CPU = torch.device("cpu")
KINDS = [("none", True), ("int8", True), *((kind, double) for kind in ("nf4", "fp4") for double in (True, False))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("quantization", "double"), KINDS)
def test_it_is_the_loaded_weight_bit_for_bit(quantization: str, double: bool, dtype: str, tiny: ResolvedModel) -> None:
    section = ModelSection(name_or_path="x", quantization=quantization, double_quantization=double, dtype=dtype)  # type: ignore[arg-type]
    model, stored = load_base(section, tiny.folder, CPU), StoredTensors(tiny.folder)
    names = linear_names(model)
    assert len(names) == 14
    for name in names:
        layer, original = model.get_submodule(name), stored.get(f"{name}.weight")
        found = trained_weight(original, section, getattr(torch, dtype), CPU)
        assert found.dtype == torch.float32
        assert torch.equal(found, dense_weight(layer, getattr(torch, dtype)).float())
        assert compute_dtype(layer) == (None if quantization == "int8" else getattr(torch, dtype))
        exact = quantization == "none" and dtype == "float32"
        assert torch.equal(found, original) == exact
        assert (found - original).abs().mean() < 0.2 * original.abs().mean()


def test_stored_tensors_are_found_in_all_shards(tiny: ResolvedModel, tmp_path: Path) -> None:
    from glora_llm.models.random_llama import TINY, write_random_llama

    write_random_llama(tmp_path, TINY, seed=0, shard_bytes=60_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    sharded, single = StoredTensors(tmp_path), StoredTensors(tiny.folder)
    weights = load_file(tiny.folder / "model.safetensors")
    assert sorted(sharded.names()) == sorted(single.names()) == sorted(weights)
    assert sharded.numbers() == single.numbers() == sum(tensor.numel() for tensor in weights.values())
    assert all(torch.equal(sharded.get(name), weights[name]) for name in weights)
    assert "lm_head.weight" in sharded and "lm_head.bias" not in sharded


def test_numbers_of_odd_shapes(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(1.0), "matrix": torch.zeros(3, 5)}, tmp_path / "model.safetensors")
    assert StoredTensors(tmp_path).numbers() == 1 + 15
