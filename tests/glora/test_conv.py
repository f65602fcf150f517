"""GLoRA on convolutions: f(x) = (W0 + W0 A + B) unfold(x) + W0 C + D b0 + E + b0, against torch's unfold in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, pad, unfold

from glora_llm.errors import UserError
from glora_llm.glora import GLoRAConfig, conv
from glora_llm.glora.conv import GLoRAConv
from glora_llm.glora.frozen_weight import dense_weight
from glora_llm.glora.path import LayerPath
from glora_llm.schema.slots import SLOTS, SUPERNET_MODES
from tests.glora.conftest import Fill
from tests.glora.formula import SCALE, bias_of, changes, require_same
from tests.glora.paths import all_paths, block_paths

SHAPES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "stride, padding, dilation": (nn.Conv2d(3, 4, (3, 2), (2, 1), (1, 2), (1, 2)), (2, 3, 6, 5)),
    "patches": (nn.Conv2d(3, 4, 2, stride=2, bias=False), (2, 3, 4, 4)),
    "groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 4, 4)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), (2, 4, 4, 4)),
    "same, an even kernel": (nn.Conv2d(2, 3, (2, 4), padding="same"), (2, 2, 5, 5)),
    "reflected": (nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect"), (2, 2, 5, 5)),
    "circular, groups": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", groups=2), (2, 2, 4, 4)),
    "one dimension": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 7)),
}


def glora_conv(base: Any, path: LayerPath, composition: str, rate: float = 0.0) -> Any:
    layer = GLoRAConv(base.double().requires_grad_(False))
    layer.update_layer("default", GLoRAConfig(composition=composition, dropout=rate), path)
    layer.set_adapter("default")
    return layer


def conv_cost(number: int) -> int:
    """Return what makes the changed weight the cheaper way, or the thin products."""
    return 10**6 if number % 2 else 0


def columns(base: Any, x: Tensor) -> Tensor:
    """Return the unfolded input of each group, (N, groups, I, P), by torch's unfold."""
    kernel, stride, dilation = base.kernel_size, base.stride, base.dilation
    pads = base._reversed_padding_repeated_twice
    x = pad(x, pads, mode="constant" if base.padding_mode == "zeros" else base.padding_mode)
    if x.dim() == 3:
        x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    return unfold(x, kernel, dilation, 0, stride).unflatten(1, (base.groups, -1))


def naive(layer: Any, composition: str, x: Tensor, dropped: Tensor) -> Tensor:
    base = layer.get_base_layer()
    w0 = base.weight.flatten(1)
    thin, thick = changes(layer, w0, composition)
    y = sum(
        torch.einsum("goi,ngip->ngop", weight.unflatten(0, (base.groups, -1)), columns(base, given))
        for weight, given in ((w0 + thick, x), (thin, dropped))
    )
    assert isinstance(y, Tensor)
    return y.flatten(1, 2) + bias_of(layer, w0, base.bias)[:, None]


def require_formula(layer: Any, composition: str, x: Tensor, rate: float = 0.0) -> None:
    x.requires_grad_()
    inputs = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    torch.manual_seed(2)
    y = layer(x)
    torch.manual_seed(2)
    wanted = naive(layer, composition, x, dropout(x, rate, training=layer.training))
    require_same(y.flatten(2), wanted, inputs, layer.path["default"])


@pytest.mark.parametrize("composition", ["product", "hadamard"])
@pytest.mark.parametrize("kind", SHAPES)
def test_every_slot_and_mode_is_the_formula(
    kind: str, composition: str, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By both ways to compute it, in turn: every path of a kind takes one of them."""
    base, shape = SHAPES[kind]
    paths = all_paths(2, SCALE, has_bias=base.bias is not None)
    paths = paths[:: 5 if kind == "groups" else 17]
    if kind == "groups":
        modes = {slot: {path[slot].mode for path in paths} for slot in SLOTS}
        assert modes == {slot: set(SUPERNET_MODES[slot]) for slot in SLOTS}
    for number, path in enumerate(paths):
        monkeypatch.setattr(conv, "THIN_COST", conv_cost(number))
        layer = glora_conv(base, path, composition)
        if list(path.active()):
            fill(layer, std=1.0)
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        require_formula(layer, composition, x)
        with torch.no_grad():
            unmerged, one = layer(x), layer(x[0])
            layer.merge(safe_merge=True)
            merged = layer.get_base_layer()
            assert type(merged) is type(base) and merged.weight.shape == base.weight.shape
            torch.testing.assert_close(merged(x), unmerged, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(one, unmerged[0], rtol=1e-10, atol=1e-10)
            layer.unmerge()
            assert layer.get_base_layer() is base and torch.equal(layer(x), unmerged)


@pytest.mark.parametrize("composition", ["product", "hadamard"])
def test_dropout_reaches_the_low_rank_factors_only(composition: str, fill: Fill) -> None:
    base, shape = SHAPES["reflected"]
    for path in all_paths(2, SCALE)[::13]:
        layer = glora_conv(base, path, composition, rate=0.5).train()
        if list(path.active()):
            fill(layer, std=1.0)
        require_formula(layer, composition, torch.randn(shape, dtype=torch.float64), rate=0.5)


def test_mode_block(fill: Fill) -> None:
    base, paths = nn.Conv2d(16, 3, 2), block_paths(1, SCALE)[::7]
    for path in paths:
        layer = glora_conv(base, path, "product")
        fill(layer, std=1.0)
        require_formula(layer, "product", torch.randn(2, 16, 3, 3, dtype=torch.float64))
    with pytest.raises(UserError, match="which 64 does not divide"):
        glora_conv(nn.Conv2d(3, 3, 3), paths[0], "product")


def test_three_dimensions(fill: Fill) -> None:
    """Against torch's own convolution with the merged weight: `unfold` has two dimensions."""
    layer = glora_conv(
        nn.Conv3d(2, 3, (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)), all_paths(2, SCALE)[0], "product"
    )
    fill(layer, std=1.0)
    x = torch.randn(2, 2, 3, 4, 3, dtype=torch.float64)
    weight, bias = layer.merged_weight(["default"])
    base = layer.get_base_layer()
    wanted = torch.nn.functional.conv3d(x, weight.view_as(base.weight), bias, base.stride, base.padding)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)


def test_gradients_of_weight_and_bias_for_a_search() -> None:
    for kind in ("groups", "reflected", "one dimension"):
        base, shape = SHAPES[kind]
        twin: Any = base.double().requires_grad_(True)
        x = torch.randn(shape, dtype=torch.float64)
        y = twin(x)
        dy = torch.randn_like(y)
        wanted = torch.autograd.grad(y, [twin.weight, twin.bias], dy)
        found = GLoRAConv(twin).output_gradients(x, dy)
        torch.testing.assert_close(found[0], dense_weight(twin).new_tensor(wanted[0].numpy()).flatten(1))
        torch.testing.assert_close(found[1], wanted[1])
        twin.requires_grad_(False)
