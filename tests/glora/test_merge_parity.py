"""The merged layer computes what the unmerged one does: every path, both compositions, dense and nf4."""

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from glora_llm.glora import GLoRAConfig, GLoRALinear
from glora_llm.glora.frozen_weight import dense_weight
from tests.glora.conftest import Fill
from tests.glora.paths import all_paths

COUNTS = {True: 432, False: 144}


def dense(bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(7, 5, bias=bias, dtype=torch.float64).requires_grad_(False)


def nf4(bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    plain = nn.Linear(64, 64, bias=bias)
    layer = bnb.nn.Linear4bit(64, 64, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(plain.state_dict())
    layer = layer.to("cpu")  # quantises
    layer.support_avx512bf16_for_cpu = False  # as load_base does: else the first evaluation repacks the weight
    return layer.requires_grad_(False)


@pytest.mark.parametrize("composition", ["product", "hadamard"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("make", "tolerance"), [(dense, 1e-12), (nf4, 1e-4)])
def test_every_path_merges(
    make: Callable[[bool], nn.Linear], tolerance: float, bias: bool, composition: str, fill: Fill
) -> None:
    base = make(bias)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    dtype = dense_weight(base).dtype
    x = torch.randn(3, base.in_features, dtype=dtype, generator=torch.Generator().manual_seed(1))
    paths = all_paths(2, 1.5, has_bias=bias)
    assert len(paths) == COUNTS[bias]
    with torch.no_grad():
        plain = base(x)
        for path in paths:
            layer = GLoRALinear(base)
            layer.update_layer("default", GLoRAConfig(composition=composition), path)
            layer.set_adapter("default")
            active = bool(list(path.active()))
            if active:
                fill(layer, std=0.5)
            unmerged = layer(x)
            assert torch.allclose(unmerged, plain, rtol=1e-3) != active, path
            layer.merge(safe_merge=True)
            merged = layer.get_base_layer()
            assert layer.merged and type(merged) is nn.Linear and merged.weight.dtype == dtype
            assert (merged.bias is not None) == (bias or path.touches_bias())
            torch.testing.assert_close(layer(x), unmerged, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(merged(x), unmerged, rtol=tolerance, atol=tolerance)
            layer.unmerge()
            assert layer.get_base_layer() is base and torch.equal(layer(x), unmerged)
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value.view(torch.uint8), after[name].view(torch.uint8)) for name, value in before.items())


def test_not_finite_values_are_not_merged(fill: Fill) -> None:
    base = dense(bias=True)
    layer: Any = GLoRALinear(base)
    layer.update_layer("default", GLoRAConfig(), all_paths(2)[0])
    layer.set_adapter("default")
    with torch.no_grad():
        layer.slot_E["default"].vector.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"The adapter default seems to be broken"):
        layer.merge(safe_merge=True)
    assert not layer.merged and layer.get_base_layer() is base
