"""f(x) = (W0 + W0 A + B) x + W0 C + D b0 + E + b0 against a naive version, with every gradient, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glora_llm.glora import GLoRAConfig, GLoRALinear
from glora_llm.glora.linear import Slots, effective, glora_linear
from glora_llm.glora.path import LayerPath, make_path
from tests.glora.conftest import Fill
from tests.glora.paths import all_paths

I, O, R, SCALE = 7, 5, 2, 1.5  # noqa: E741 - the letters of the formula
BATCH, TOKENS = 2, 3
COMPOSITIONS = ["product", "hadamard"]
COUNTS = {True: 432, False: 144}


def glora_layer(path: LayerPath, composition: str, bias: bool, dropout: float = 0.0) -> Any:
    torch.manual_seed(1)
    layer = GLoRALinear(nn.Linear(I, O, bias=bias, dtype=torch.float64).requires_grad_(False))
    layer.update_layer("default", GLoRAConfig(composition=composition, dropout=dropout), path)
    layer.set_adapter("default")
    return layer


def matrix(layer: Any, slot: str) -> Tensor | float:
    """The slot as scale * down @ up, or its one vector or scalar, from the stored parameters; 0 for mode none."""
    modules = getattr(layer, f"slot_{slot}")
    if "default" not in modules:
        return 0.0
    stored = dict(modules["default"].named_parameters())
    return SCALE * stored["down"] @ stored["up"] if "down" in stored else next(iter(stored.values())).reshape(-1, 1)


def naive(layer: Any, composition: str) -> tuple[Tensor, Tensor, Tensor]:
    """The formula as it is written: (weight, the low-rank part of it, bias)."""
    w0: Tensor = layer.get_base_layer().weight
    b0 = layer.bias if layer.bias is not None else torch.zeros(O, dtype=w0.dtype)
    low_rank = {slot: layer.path["default"][slot].mode == "lora" for slot in "AB"}
    a, b, c, d, e = (matrix(layer, slot) for slot in "ABCDE")
    scaled = w0 @ a if low_rank["A"] and composition == "product" else w0 * a
    shifted = b + torch.zeros_like(w0)
    thin = sum((part for part, is_thin in ((scaled, low_rank["A"]), (shifted, low_rank["B"])) if is_thin), 0 * w0)
    prompt = w0 @ (c + w0.new_zeros(I, 1))
    bias = prompt + d * b0[:, None] + e + b0[:, None]
    return w0 + scaled + shifted, thin, bias[:, 0]


def naive_forward(layer: Any, composition: str, x: Tensor, dropped: Tensor) -> Tensor:
    weight, thin, bias = naive(layer, composition)
    return x @ (weight - thin).t() + dropped @ thin.t() + bias


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    upstream = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    return list(torch.autograd.grad(y, inputs, upstream))


def require_equal(layer: Any, composition: str, x: Tensor, rate: float) -> None:
    """The fused forward pass and all of its gradients are the naive ones, with the same mask of dropout."""
    inputs = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    torch.manual_seed(2)
    y = layer(x)
    torch.manual_seed(2)
    dropped = nn.functional.dropout(x, rate, training=layer.training)
    expected = naive_forward(layer, composition, x, dropped)
    path = layer.path["default"]
    assert y.shape == (*x.shape[:-1], O)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12, msg=f"{path}: output")
    pairs = zip(gradients(y, inputs), gradients(expected, inputs), strict=True)
    for place, (found, wanted) in enumerate(pairs):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12, msg=f"{path}: gradient {place}")


def rows() -> Tensor:
    x = torch.randn(BATCH, TOKENS, I, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x.requires_grad_()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_every_path_is_the_formula(composition: str, bias: bool, fill: Fill) -> None:
    paths = all_paths(R, SCALE, has_bias=bias)
    assert len(paths) == len(set(paths)) == COUNTS[bias]
    for path in paths:
        layer = glora_layer(path, composition, bias)
        if list(path.active()):
            fill(layer, std=1.0)
        require_equal(layer, composition, rows(), rate=0.0)
        b0 = layer.bias
        weight, own_bias = effective(layer.get_base_layer().weight, b0, layer.slots("default"), composition)
        wanted_weight, _, wanted_bias = naive(layer, composition)
        torch.testing.assert_close(weight, wanted_weight, rtol=1e-10, atol=1e-12)
        assert (own_bias is not None) == (bias or path.touches_bias())
        if own_bias is not None:
            torch.testing.assert_close(own_bias, wanted_bias, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("composition", ["product", "hadamard"])
def test_dropout_reaches_the_low_rank_factors_only(composition: str, bias: bool, fill: Fill) -> None:
    changed, paths = 0, all_paths(R, SCALE, has_bias=bias)
    assert len(paths) == COUNTS[bias]
    for path in paths:
        layer = glora_layer(path, composition, bias, dropout=0.5).train()
        if list(path.active()):
            fill(layer, std=1.0)
        require_equal(layer, composition, rows(), rate=0.5)
        with torch.no_grad():
            trained, evaluated = layer(rows()), layer.eval()(rows())
        low_rank = "lora" in (path["A"].mode, path["B"].mode)
        assert torch.equal(trained, evaluated) != low_rank
        changed += low_rank
    assert changed == len(paths) * 7 // 16  # of the 4 * 4 choices for A and B, 7 have a lora


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("ranks", [(3, 1), (1, 3)])
def test_ranks_and_alphas_by_slot(composition: str, ranks: tuple[int, int], fill: Fill) -> None:
    slots = {slot: {"mode": "lora", "rank": r, "alpha": SCALE * r} for slot, r in zip("AB", ranks, strict=True)}
    layer = glora_layer(make_path(slots | {"E": "vector"}, rank=9, alpha=9.0), composition, bias=True)
    fill(layer, std=1.0)
    assert [layer.slot_A["default"].up.shape[0], layer.slot_B["default"].up.shape[0]] == list(ranks)
    require_equal(layer, composition, rows(), rate=0.0)


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_one_output_and_rows_of_every_shape(composition: str, fill: Fill) -> None:
    base = nn.Linear(I, 1, dtype=torch.float64).requires_grad_(False)
    layer = GLoRALinear(base)
    layer.update_layer("default", GLoRAConfig(composition=composition), all_paths(R, SCALE)[0])
    layer.set_adapter("default")
    fill(layer, std=1.0)
    weight, bias = layer.merged_weight(["default"])
    for shape in ((I,), (4, I), (2, 3, I), (2, 1, 3, I), (0, I)):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, bias))
    strided = torch.randn(I, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).t()
    torch.testing.assert_close(layer(strided), nn.functional.linear(strided, weight, bias))


# (composition, modes of A B C D E): each branch of both functions
CHECKED = [
    *((composition, modes) for composition in COMPOSITIONS for modes in ("llvvv", "lllss", "lnnnn", "lvlnv", "lsvsn")),
    *(("product", modes) for modes in ("nnnnn", "nlvvv", "vlvvv", "vvvvv", "sslss", "slnnn", "nvnns")),
]
WORDS = {"l": "lora", "v": "vector", "s": "scalar", "n": "none"}
PLACES = {"a_down": "A", "a_up": "A", "a_gain": "A", "b_down": "B", "b_up": "B", "b_shift": "B", "c": "C", "d": "D"}


def leaves(composition: str, modes: str) -> dict[str, Tensor]:
    """Random slot values by their name in `Slots`."""
    mode = {slot: WORDS[letter] for slot, letter in zip("ABCDE", modes, strict=True)}
    shapes: dict[str, tuple[int, ...]] = {}
    if mode["A"] == "lora":
        shapes |= {"a_down": (I if composition == "product" else O, 3), "a_up": (3, I)}
    if mode["B"] == "lora":
        shapes |= {"b_down": (O, R), "b_up": (R, I)}
    size = {"vector": O, "scalar": 1}
    for slot, name in {"A": "a_gain", "B": "b_shift", "D": "d", "E": "e"}.items():
        if mode[slot] in size:
            shapes[name] = (size[mode[slot]],)
    if mode["C"] != "none":
        shapes["c"] = (I,)
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize(("composition", "modes"), CHECKED)
def test_gradcheck(composition: str, modes: str, dropping: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    w0, b0 = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((O, I), (O,)))
    values = leaves(composition, modes)
    x = torch.randn(4, I, dtype=torch.float64, generator=generator).requires_grad_()
    dropped = torch.randn(4, I, dtype=torch.float64, generator=generator).requires_grad_()

    def call(x: Tensor, dropped: Tensor, *tensors: Tensor) -> Tensor:
        slots = Slots(a_scale=0.7, b_scale=1.3, **dict(zip(values, tensors, strict=True)))
        return glora_linear(x, lambda: w0, O, b0, slots, composition, dropped if dropping else None)

    if not dropping:
        assert torch.autograd.gradcheck(lambda x, *tensors: call(x, x, *tensors), (x, *values.values()))
    elif {"a_down", "b_down"} & set(values):  # else nothing sees the dropped input
        assert torch.autograd.gradcheck(call, (x, dropped, *values.values()))


def saved_sizes(run: Callable[[Tensor], Tensor], x: Tensor) -> list[int]:
    """Elements of every tensor that autograd keeps for the backward pass."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x).sum().backward()
    return sizes


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_nothing_of_the_size_of_w0_is_kept(composition: str, fill: Fill) -> None:
    size, tokens, paths = 64, 2, all_paths(R, SCALE)
    base = nn.Linear(size, size).requires_grad_(False)
    x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    kept = 0
    for path in paths:
        layer = GLoRALinear(base)
        layer.update_layer("default", GLoRAConfig(composition=composition), path)
        layer.set_adapter("default")
        sizes = saved_sizes(layer, x)
        assert max(sizes, default=0) <= size * max(tokens, 2 * R), path  # [W0 A_d | B_d] has 2 R columns
        kept += bool(sizes)
    assert kept == len(paths) == 432
    naive_sizes = saved_sizes(lambda x: nn.functional.linear(x, base.weight * (1 + x.sum())), x)
    assert max(naive_sizes) >= size * size  # what a formed weight would leave


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_w0_is_read_once_forward_and_once_backward(composition: str) -> None:
    reads: list[int] = []
    w0 = torch.randn(O, I, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def read() -> Tensor:
        reads.append(1)
        return w0

    slots: dict[str, Any] = leaves(composition, "llvvv")
    y = glora_linear(rows(), read, O, torch.ones(O, dtype=torch.float64), Slots(**slots), composition)
    assert len(reads) == 1
    y.sum().backward()
    assert len(reads) == 2


def test_the_frozen_weight_stays_as_it_is(fill: Fill) -> None:
    for composition in COMPOSITIONS:
        layer = glora_layer(all_paths(R, SCALE)[0], composition, bias=True)
        fill(layer, std=1.0)
        before = [value.clone() for value in layer.get_base_layer().state_dict().values()]
        layer(rows()).sum().backward()
        assert all(map(torch.equal, before, layer.get_base_layer().state_dict().values()))
        assert all(value.grad is None for value in layer.get_base_layer().parameters())
