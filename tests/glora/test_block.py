"""A in mode block: formula, gradients, merges, nf4 and int8, against the formula as it is written, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glora_llm.errors import UserError
from glora_llm.glora import GLoRAConfig, GLoRALinear
from glora_llm.glora.block import Block, block_factors
from glora_llm.glora.frozen_weight import block_scales, dense_weight, unpack
from glora_llm.glora.linear import effective
from glora_llm.glora.path import LayerPath, genome_from_json, genome_to_json, make_path
from glora_llm.models.quantised import quantised_linear
from glora_llm.schema import ModelSection
from tests.glora.conftest import Fill
from tests.glora.paths import block_paths

I, O, R, SCALE = 192, 5, 2, 1.5  # noqa: E741 - the letters of the formula
COUNTS = {True: 108, False: 36}
LOSSLESS = make_path({"A": "block", "C": "vector", "E": "vector"}, R, SCALE * R)


def adapted(base: nn.Module, path: LayerPath, dropout: float = 0.0) -> Any:
    layer = GLoRALinear(base.requires_grad_(False))
    layer.update_layer("default", GLoRAConfig(dropout=dropout), path)
    layer.set_adapter("default")
    return layer


def dense(bias: bool, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(I, O, bias=bias, dtype=dtype)


def quantised(quantization: Any, bias: bool, dtype: torch.dtype = torch.float32) -> Any:
    section = ModelSection(name_or_path="x", quantization=quantization)
    plain = dense(bias, torch.float32)
    layer: Any = quantised_linear(plain.weight.data.to(dtype), section, dtype, torch.device("cpu"))
    layer.bias = nn.Parameter(plain.bias.data.to(dtype)) if bias else None
    return layer


def inputs(dtype: torch.dtype = torch.float64, tokens: int = 6) -> Tensor:
    return torch.randn(tokens, I, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def naive_gains(layer: Any) -> Tensor:
    """G by a loop over blocks: every value of a block of 64 has the gain of its block."""
    down, up = layer.slot_A["default"].block_down, layer.slot_A["default"].block_up
    columns = [SCALE * (down @ up[:, place // 64]) for place in range(I)]
    return torch.stack(columns, 1)


def naive(layer: Any, x: Tensor, dropped: Tensor) -> Tensor:
    w0, b0 = layer.get_base_layer().weight, layer.b0
    s = layer.slots("default")
    y = x @ (w0 * (1 + naive_gains(layer))).t() + (w0 @ s.c if s.c is not None else 0)
    if s.b_down is not None:
        y = y + dropped @ (SCALE * s.b_down @ s.b_up).t()
    if s.b_shift is not None:
        y = y + x.sum(1, keepdim=True) * s.b_shift
    b0 = torch.zeros(O, dtype=x.dtype) if b0 is None else b0
    return y + b0 + (s.d if s.d is not None else 0) * b0 + (s.e if s.e is not None else 0)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bias", [True, False])
def test_every_path_is_the_formula_with_its_gradients(bias: bool, dropout: float, fill: Fill) -> None:
    paths = block_paths(R, SCALE, bias)
    assert len(paths) == len(set(paths)) == COUNTS[bias]
    for path in paths:
        layer = adapted(dense(bias), path, dropout).train()
        fill(layer, std=1.0)
        x = inputs().requires_grad_()
        torch.manual_seed(2)
        y = layer(x)
        torch.manual_seed(2)
        expected = naive(layer, x, nn.functional.dropout(x, dropout))
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10, msg=str(path))
        leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
        upstream = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
        pairs = (torch.autograd.grad(value, leaves, upstream) for value in (y, expected))
        for found, wanted in zip(*pairs, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10, msg=str(path))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", ["dense", "nf4", "int8"])
def test_every_path_merges_and_starts_as_the_base(make: str, bias: bool, fill: Fill) -> None:
    paths = block_paths(R, SCALE, bias)
    base = dense(bias) if make == "dense" else quantised(make, bias)
    dtype, tolerance = (torch.float64, 1e-12) if make == "dense" else (torch.float32, 1e-4)
    w0 = dense_weight(base, dtype)
    x = inputs(dtype)
    b0 = base.bias
    plain = nn.functional.linear(x, w0, b0)
    for path in paths:
        layer = adapted(base, path)
        for name, parameter in layer.named_parameters():
            if name.endswith(("vector", "scalar")):
                assert not parameter.any(), name
        torch.testing.assert_close(layer(x), plain, rtol=tolerance, atol=tolerance)
        fill(layer, std=0.5)
        unmerged = layer(x)
        assert not torch.allclose(unmerged, plain, rtol=1e-3)
        weight, own_bias = effective(w0, b0, layer.slots("default").to(dtype), "product")
        torch.testing.assert_close(nn.functional.linear(x, weight, own_bias), unmerged, rtol=tolerance, atol=tolerance)
        layer.merge(safe_merge=True)
        torch.testing.assert_close(layer(x), unmerged, rtol=tolerance, atol=tolerance)
        layer.unmerge()
        assert layer.get_base_layer() is base and torch.equal(layer(x), unmerged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_pass_is_that_of_the_merged_4_bit_weight_bit_for_bit(
    dtype: torch.dtype, fill: Fill, device: torch.device
) -> None:
    """The layer's output is x times the same codes with other scales; codes and scales of the base stay."""
    base = quantised("nf4", False, dtype).to(device)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    layer = adapted(base, make_path({"A": "block"}, R, SCALE * R)).to(device)
    fill(layer, std=0.5)
    x = inputs(dtype).to(device).requires_grad_()
    y = layer(x)
    y.sum().backward()
    s = layer.slots("default")
    factors = block_factors(s.a_down, s.a_blocks, s.a_scale).detach()
    merged = unpack(base.weight, block_scales(base.weight) * factors)
    assert torch.equal(y, nn.functional.linear(x, merged))
    assert not torch.equal(merged, dense_weight(base))
    expected = torch.einsum("to,ti,oi->oi", torch.ones_like(y), x, dense_weight(base)).unflatten(1, (-1, 64)).sum(2)
    found = layer.slot_A["default"].block_down.grad
    wanted = (SCALE * expected.float() @ s.a_blocks.float().t()).detach()
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.02 * float(wanted.detach().abs().max()))
    for name, value in base.state_dict().items():
        assert torch.equal(value.view(torch.uint8), before[name].view(torch.uint8)), name


def test_scales_are_those_that_unpack_the_weight() -> None:
    weight = quantised("nf4", False).weight
    assert weight.quant_state.nested  # the quantisation of the scales is undone
    assert torch.equal(unpack(weight, block_scales(weight)), dense_weight(quantised("nf4", False)))


def test_nothing_as_large_as_w0_or_the_gains_is_kept(fill: Fill) -> None:
    base, tokens = nn.Linear(256, 256), 2
    layer = adapted(base, LOSSLESS)
    fill(layer, std=1.0)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(tokens, 256, requires_grad=True))
    assert sizes and max(sizes) <= 256 * tokens < 256 * 256 // 64


def test_a_4_bit_weight_is_unpacked_once_with_other_scales_in_the_forward_pass(monkeypatch: Any, fill: Fill) -> None:
    from glora_llm.glora import frozen_weight

    layer = adapted(quantised("nf4", False), make_path({"A": "block", "E": "vector"}, R, 1.0))
    counts = {"unpack": 0, "dense_weight": 0}
    for name in counts:
        original = getattr(frozen_weight, name)

        def counted(*arguments: Any, name: str = name, original: Any = original) -> Tensor:
            counts[name] += 1
            found: Tensor = original(*arguments)
            return found

        monkeypatch.setattr(frozen_weight, name, counted)
    y = layer(inputs(torch.float32).requires_grad_())
    assert counts == {"unpack": 1, "dense_weight": 0}
    y.sum().backward()
    assert counts == {"unpack": 2, "dense_weight": 1}


def test_gradcheck(fill: Fill) -> None:
    layer = adapted(dense(True), make_path({"A": "block", "B": "lora", "C": "lora", "D": "vector"}, R, 3.0))
    fill(layer, std=1.0)
    x = inputs(tokens=2).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)
    assert Block.__name__ in str(layer(x).grad_fn.next_functions)


def test_a_genome_of_blocks_survives_json() -> None:
    genome = {f"layer.{place}": path for place, path in enumerate(block_paths(R, 0.25))}
    assert genome_from_json(genome_to_json(genome)) == genome
    assert LOSSLESS.lossy_slots() == []
    assert make_path({"A": "lora", "B": "scalar", "E": "vector"}, 1, 1.0).lossy_slots() == ["A", "B"]


@pytest.mark.parametrize(
    ("features", "rank", "message"),
    [
        (72, 1, "this one has 72, which 64 does not divide. Give this layer another mode by adapter.paths"),
        (128, 3, "rank 3, and a row of 128 inputs has 2 blocks of 64, so a rank above 2 adds nothing"),
    ],
)
def test_what_block_cannot_be(features: int, rank: int, message: str) -> None:
    layer = GLoRALinear(nn.Linear(features, 8))
    with pytest.raises(UserError, match=message):
        layer.update_layer("default", GLoRAConfig(), make_path({"A": "block"}, rank, 1.0))


def test_hadamard_is_of_mode_lora() -> None:
    with pytest.raises(UserError, match="composition hadamard is of slot A in mode lora"):
        GLoRAConfig(slots={"A": "block", "E": "vector"}, composition="hadamard")
    GLoRAConfig(slots={"A": "block"}, paths={"up": {"A": "lora"}}, composition="hadamard")


@pytest.mark.parametrize("slot", ["B", "C", "D", "E"])
def test_block_is_a_mode_of_a_alone(slot: str) -> None:
    with pytest.raises(UserError, match=f"Slot {slot} has no mode 'block'; it has: "):
        make_path({slot: "block"}, 1, 1.0)
