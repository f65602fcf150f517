"""What differs between devices: each test runs on the CPU and, marked gpu, on a GPU, against float64 on the CPU."""

from collections import Counter
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from glora_llm.glora import GLoRAConfig, GLoRALinear
from glora_llm.glora import layer as glora_layer
from glora_llm.glora.frozen_weight import dense_weight
from glora_llm.glora.linear import effective, glora_linear
from glora_llm.glora.path import make_path
from tests.glora.conftest import Fill

I, O, TOKENS = 256, 128, 24  # noqa: E741 - the letters of the formula
ALL_SLOTS = {"A": "lora", "B": "lora", "C": "vector", "E": "vector"}
VECTORS = {"A": "vector", "B": "vector", "C": "vector", "D": "vector", "E": "vector"}
BLOCKS: dict[str, Any] = {"A": {"mode": "block", "rank": 2, "alpha": 4.0}, "C": "vector", "D": "vector"}
BASES = ["dense", "nf4", "fp4", "int8"]
COMPOSITIONS = ["product", "hadamard"]


def w0() -> Tensor:
    return 0.1 * torch.randn(O, I, generator=torch.Generator().manual_seed(0))


def base_layer(kind: str, dtype: torch.dtype, device: torch.device, bias: bool = False) -> Any:
    """A frozen linear whose weight is that of `w0`, quantised on the device."""
    layer: Any
    if kind == "dense":
        layer = nn.Linear(I, O, bias=bias, dtype=dtype)
        layer.weight.data = w0().to(dtype)
    elif kind == "int8":
        layer = bnb.nn.Linear8bitLt(I, O, bias=bias, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(w0().to(dtype), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(I, O, bias=bias, compute_dtype=dtype, quant_type=kind)
        layer.weight = bnb.nn.Params4bit(w0().to(dtype), requires_grad=False, quant_type=kind, quant_storage=dtype)
    if bias:
        layer.bias = nn.Parameter(torch.linspace(-1, 1, O, dtype=dtype))
    layer = layer.to(device).requires_grad_(False)
    if kind in ("nf4", "fp4"):
        layer.support_avx512bf16_for_cpu = False  # as load_base does
    return layer


def adapted(base: Any, fill: Fill, slots: dict[str, Any], composition: str = "product", **keys: Any) -> Any:
    """A layer whose slots look trained; their parameters have the dtype of the inputs, as ZeRO 1 to 3 trains them."""
    dtype = keys.pop("dtype", torch.float32)
    layer: Any = GLoRALinear(base, dtype)
    layer.update_layer("default", GLoRAConfig(composition=composition), make_path(slots, rank=8, alpha=16.0))
    layer.set_adapter("default")
    fill(layer, std=0.05)
    for value in layer.parameters():
        if value.requires_grad:
            value.data = value.data.to(dtype)
    return layer


def rows(dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.randn(2, TOKENS // 2, I, generator=torch.Generator().manual_seed(1))
    return x.to(device, dtype).requires_grad_()


def trained(layer: Any) -> dict[str, Tensor]:
    return {name: value for name, value in layer.named_parameters() if value.requires_grad}


def run(layer: Any, x: Tensor) -> dict[str, Tensor]:
    """The output and all gradients of a fixed function of it, in float64 on the CPU."""
    y = layer(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    parameters = trained(layer)
    gradients = torch.autograd.grad(y, [x, *parameters.values()], upstream)
    found = {"y": y, "x": gradients[0], **dict(zip(parameters, gradients[1:], strict=True))}
    return {name: value.detach().cpu().double() for name, value in found.items()}


def reference(layer: Any, x: Tensor) -> dict[str, Tensor]:
    """The same by the formula, in float64 on the CPU, from the weight that the layer computes with."""
    base = layer.get_base_layer()
    weight = dense_weight(base, x.dtype).cpu().double()
    b0 = None if base.bias is None else base.bias.detach().cpu().double()
    leaves = {name: value.detach().cpu().double().requires_grad_() for name, value in trained(layer).items()}
    by_id = {id(value): leaves[name] for name, value in trained(layer).items()}
    slots = layer.slots("default", lambda parameter: by_id[id(parameter)])
    x64 = x.detach().cpu().double().requires_grad_()
    y = nn.functional.linear(x64, *effective(weight, b0, slots, layer.composition["default"]))
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype).double()
    gradients = torch.autograd.grad(y, [x64, *leaves.values()], upstream)
    return {"y": y.detach(), "x": gradients[0], **dict(zip(leaves, gradients[1:], strict=True))}


def require_near(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        largest = float(value.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * largest, msg=f"{name} differs")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("kind", BASES)
def test_output_and_gradients_are_the_formula_in_float64(
    kind: str, composition: str, dtype: torch.dtype, tolerance: float, fill: Fill, device: torch.device
) -> None:
    layer = adapted(base_layer(kind, dtype, device), fill, ALL_SLOTS, composition, dtype=dtype)
    x = rows(dtype, device)
    require_near(run(layer, x), reference(layer, x), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("kind", BASES)
def test_a_by_blocks_is_the_formula_in_float64(
    kind: str, dtype: torch.dtype, tolerance: float, fill: Fill, device: torch.device
) -> None:
    for slots in (BLOCKS, BLOCKS | {"B": "lora", "E": "scalar"}, BLOCKS | {"B": "vector", "C": "none"}):
        layer = adapted(base_layer(kind, dtype, device, bias=True), fill, slots, dtype=dtype)
        x = rows(dtype, device)
        require_near(run(layer, x), reference(layer, x), tolerance)


@pytest.mark.parametrize("kind", BASES)
def test_vectors_and_a_frozen_bias(kind: str, fill: Fill, device: torch.device) -> None:
    layer = adapted(base_layer(kind, torch.float32, device, bias=True), fill, VECTORS)
    x = rows(torch.float32, device)
    require_near(run(layer, x), reference(layer, x), 1e-5)


def test_float32_slots_on_a_bfloat16_base(fill: Fill, device: torch.device) -> None:
    layer = adapted(base_layer("nf4", torch.bfloat16, device), fill, ALL_SLOTS)
    x = rows(torch.bfloat16, device)
    assert {value.dtype for value in trained(layer).values()} == {torch.float32}
    require_near(run(layer, x), reference(layer, x), 3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BASES[1:])
def test_a_quantised_weight_unpacks_as_on_the_cpu(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    found = dense_weight(base_layer(kind, dtype, device), dtype)
    assert found.device.type == device.type and found.dtype == dtype
    wanted = dense_weight(base_layer(kind, dtype, torch.device("cpu")), dtype)
    # one value in a thousand may be rounded to its neighbour: block scales are sums of floats
    near = torch.isclose(found.cpu().float(), wanted.float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert near.float().mean() > 0.999
    torch.testing.assert_close(found.cpu().float(), w0(), rtol=0, atol=0.08)


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("kind", BASES)
def test_merged_is_unmerged(kind: str, composition: str, fill: Fill, device: torch.device) -> None:
    layer = adapted(base_layer(kind, torch.float32, device), fill, ALL_SLOTS, composition)
    x = rows(torch.float32, device)
    with torch.no_grad():
        unmerged = layer(x)
        layer.merge(safe_merge=True)
        assert layer.get_base_layer().weight.device == x.device
        torch.testing.assert_close(layer(x), unmerged, rtol=1e-4, atol=1e-4)
        layer.unmerge()
        assert torch.equal(layer(x), unmerged)


def test_int8_computes_in_bfloat16(fill: Fill, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def spy(x: Tensor, read_weight: Any, *args: Any) -> Tensor:
        seen.extend((x.dtype, read_weight().dtype))
        return glora_linear(x, read_weight, *args)

    monkeypatch.setattr(glora_layer, "glora_linear", spy)
    layer = adapted(base_layer("int8", torch.bfloat16, device), fill, ALL_SLOTS, dtype=torch.bfloat16)
    assert layer(rows(torch.bfloat16, device)).dtype == torch.bfloat16
    assert seen == [torch.bfloat16, torch.bfloat16]


class Kernels(TorchDispatchMode):
    """Counts the operations that compute or copy; views and empty tensors cost no kernel."""

    FREE = ("aten.detach.default", "aten._unsafe_view.default")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if not func.is_view and name not in self.FREE and "empty" not in name:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


# base, dtype of the slots -> kernels forward, kernels backward; unpacking nf4 with double quantisation takes three
@pytest.mark.parametrize(
    ("kind", "slots_dtype", "forward", "backward"),
    [
        ("nf4", torch.bfloat16, 10, 13),
        ("dense", torch.bfloat16, 7, 10),
        ("nf4", torch.float32, 13, 19),  # dtype casts: three in forward, six gradients in backward
        ("dense", torch.float32, 10, 16),
    ],
)
def test_kernels_of_a_linear(
    kind: str, slots_dtype: torch.dtype, forward: int, backward: int, fill: Fill, device: torch.device
) -> None:
    layer = adapted(base_layer(kind, torch.bfloat16, device), fill, ALL_SLOTS, dtype=slots_dtype)
    x = rows(torch.bfloat16, device)
    with Kernels() as first:
        y = layer(x)
    upstream = torch.ones_like(y)
    with Kernels() as second:
        y.backward(upstream)
    assert all(value.grad is not None for value in [x, *trained(layer).values()])
    assert first.found.total() <= forward, first.found
    assert second.found.total() <= backward, second.found


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("kind", BASES)
def test_compiled_is_eager(kind: str, composition: str, fill: Fill, device: torch.device) -> None:
    """In one graph, without a break."""
    eager, compiled = (adapted(base_layer(kind, torch.float32, device), fill, ALL_SLOTS, composition) for _ in range(2))
    x = rows(torch.float32, device)
    torch._dynamo.reset()
    counters.clear()
    compiled.compile(fullgraph=True, backend="aot_eager")
    require_near(run(compiled, x), run(eager, x), 1e-6)
    assert counters["stats"]["unique_graphs"] == 1
