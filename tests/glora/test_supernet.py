"""A supernet computes what the plain layer of the drawn path computes, bit for bit, and nothing else."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glora_llm.errors import UserError
from glora_llm.glora import GLoRAConfig, GLoRALinear
from glora_llm.glora.learning_rates import DEFAULT_LR_FACTORS, lr_factors
from glora_llm.glora.path import LayerPath, SlotSpec
from glora_llm.glora.path_sampler import draw_path
from glora_llm.glora.supernet import MODE_OF, slot_choices
from glora_llm.models.load import load_base
from glora_llm.models.resolve import ResolvedModel
from glora_llm.schema import ModelSection
from glora_llm.schema.slots import SLOTS, SUPERNET_MODES
from tests.glora.conftest import Fill, Llama, glora
from tests.glora.paths import all_paths

I, O, TOKENS = 9, 10, 3  # noqa: E741 - the letters of the formula
RANKS = (8, 4, 2)
SCALE = 0.5
CHOICES = slot_choices(None, RANKS, RANKS[0] * SCALE)
KINDS = [("product", True), ("product", False), ("hadamard", True), ("hadamard", False)]
Gradients = dict[str, Tensor]
Wrap = Callable[[GLoRALinear, Tensor], Tensor]


def supernet_layer(base: nn.Module, composition: str, fill: Fill, dropout: float = 0.0) -> GLoRALinear:
    """A supernet of all modes on a linear, with values in all of its parameters."""
    layer = GLoRALinear(base.requires_grad_(False))
    config = GLoRAConfig(
        supernet={"ranks": list(RANKS)}, alpha=RANKS[0] * SCALE, composition=composition, dropout=dropout
    )
    layer.update_layer("default", config, LayerPath(()))
    layer.set_adapter("default")
    fill(layer)
    return layer


def linear(has_bias: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(I, O, bias=has_bias)


def rows(layer: GLoRALinear) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, TOKENS, layer.in_features, generator=generator).requires_grad_()


def drawn_part(name: str, value: Tensor, path: LayerPath) -> Tensor | None:
    """Return what a path reads of a supernet's parameter (`slot_A.default.down`), or None."""
    slot, kind = name.partition("slot_")[2][0], name.rpartition(".")[2]
    spec = path[slot]
    if spec.rank and MODE_OF.get(kind) == spec.mode:
        return value[:, : spec.rank] if kind.endswith("down") else value[: spec.rank]
    return value if spec.mode == kind else None


def plain_layer(net: GLoRALinear, path: LayerPath) -> GLoRALinear:
    """The layer that is trained on that path alone, on the same base, with the weights of the supernet."""
    layer = GLoRALinear(net.get_base_layer())
    config = GLoRAConfig(composition=net.composition["default"], dropout=net.dropout["default"])
    layer.update_layer("default", config, path)
    layer.set_adapter("default")
    given = dict(net.named_parameters())
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "slot_" in name:
                part = drawn_part(name, given[name], path)
                assert part is not None
                parameter.copy_(part)
    return layer


def step(layer: GLoRALinear, call: Wrap | None = None) -> tuple[Tensor, Gradients]:
    """Return the output, and the gradients of x and of all that is trained."""
    for parameter in layer.parameters():
        parameter.grad = None
    x = rows(layer)
    if layer.dropout["default"]:
        torch.manual_seed(2)
    y = call(layer, x) if call else layer(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype))
    found = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    assert x.grad is not None and all(gradient is not None for gradient in found.values())
    return y.detach(), {name: g for name, g in found.items() if g is not None} | {"x": x.grad}


def require_the_plain_layer(net: GLoRALinear, path: LayerPath) -> None:
    """Output and gradients of a path are the plain layer's bit for bit; what is not drawn has a gradient of zero."""
    net.path["default"] = path
    y, gradients = step(net)
    expected, wanted = step(plain_layer(net, path))
    assert torch.equal(y, expected), path
    assert torch.equal(gradients.pop("x"), wanted.pop("x")), path
    for name, gradient in gradients.items():
        part = drawn_part(name, gradient, path)
        left = gradient.count_nonzero()
        if part is not None:
            assert torch.equal(part, wanted.pop(name)), (path, name)
            left = left - part.count_nonzero()
        assert left == 0, (path, name)
    assert not wanted


def every_path(has_bias: bool) -> Iterator[LayerPath]:
    """All paths at three ranks, those without mode lora once; then some whose slots differ in rank."""
    yield from dict.fromkeys(path for rank in RANKS for path in all_paths(rank, SCALE, has_bias))
    yield from (draw_path(CHOICES, has_bias, number) for number in range(50))


@pytest.mark.parametrize(("composition", "has_bias"), KINDS)
def test_every_path_is_the_plain_layer_bit_for_bit(composition: str, has_bias: bool, fill: Fill) -> None:
    net = supernet_layer(linear(has_bias), composition, fill)
    paths = list(every_path(has_bias))
    assert len(paths) == (972 if has_bias else 324) + 50
    assert any(len({spec.rank for _, spec in path.active() if spec.mode == "lora"}) > 1 for path in paths)
    for path in paths:
        require_the_plain_layer(net, path)


@pytest.mark.parametrize("composition", ["product", "hadamard"])
def test_dropout_and_bfloat16_change_nothing_of_that(composition: str, fill: Fill) -> None:
    dropping = supernet_layer(linear(True), composition, fill, dropout=0.3)
    plain = supernet_layer(linear(True), composition, fill)
    for number in range(20):
        path = draw_path(CHOICES, True, number)
        require_the_plain_layer(dropping, path)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            require_the_plain_layer(plain, path)


@pytest.mark.parametrize("composition", ["product", "hadamard"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_supernet_is_the_plain_layer_bit_for_bit(
    quantization: Any, composition: str, tiny: ResolvedModel, fill: Fill
) -> None:
    section = ModelSection(name_or_path="x", quantization=quantization)
    base = load_base(section, tiny.folder, torch.device("cpu"))
    net = supernet_layer(base.get_submodule("model.layers.0.mlp.down_proj"), composition, fill)
    assert type(net.get_base_layer()).__name__ in ("Linear4bit", "Linear8bitLt")
    for path in [*all_paths(4, SCALE, has_bias=False)[::24], *(draw_path(CHOICES, False, n) for n in range(10))]:
        require_the_plain_layer(net, path)


@pytest.mark.parametrize("has_bias", [True, False])
def test_where_all_slots_are_none_everything_has_a_gradient_of_zero(has_bias: bool, fill: Fill) -> None:
    net = supernet_layer(linear(has_bias), "product", fill)
    net.path["default"] = LayerPath(())
    for x in (rows(net), rows(net).detach()):  # and where the input needs no gradient: the first layer
        y = net(x)
        assert torch.equal(y, net.get_base_layer()(x))
        y.sum().backward()
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    assert len(trained) == 4 + 4 + 3 + (2 if has_bias else 0) + 2
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 and p.any() for p in trained)


@pytest.mark.parametrize(("composition", "has_bias"), KINDS)
def test_what_is_not_drawn_is_not_read(composition: str, has_bias: bool, fill: Fill) -> None:
    """With NaN in all that a path leaves out, output and gradients are what they were."""
    for number in range(40):
        path = draw_path(CHOICES, has_bias, number)
        net = supernet_layer(linear(has_bias), composition, fill)
        net.path["default"] = path
        expected, wanted = step(net)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if "slot_" in name:
                    kept = drawn_part(name, parameter.clone(), path)
                    drawn = drawn_part(name, parameter.fill_(torch.nan), path)
                    if kept is not None and drawn is not None:
                        drawn.copy_(kept)
        assert any(parameter.isnan().any() for parameter in net.parameters())
        y, gradients = step(net)
        with torch.no_grad():
            assert torch.equal(net(rows(net)), expected) and torch.equal(y, expected)
        assert y.isfinite().all() and all(torch.equal(g, wanted[name]) for name, g in gradients.items())


def test_gradients_of_two_draws_add_up(fill: Fill) -> None:
    """Micro steps of one step: what one of them draws keeps its gradient in the other."""
    net = supernet_layer(linear(True), "product", fill)
    paths = [draw_path(CHOICES, True, number) for number in (0, 1)]
    parts = []
    for path in paths:
        net.path["default"] = path
        parts.append(step(net)[1])
    for parameter in net.parameters():
        parameter.grad = None
    for path in paths:
        net.path["default"] = path
        y = net(rows(net))
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, parts[0][name] + parts[1][name])


@pytest.mark.parametrize("composition", ["product", "hadamard"])
def test_smaller_ranks_are_the_first_columns(composition: str, fill: Fill) -> None:
    """Rank 4 computes what rank 8 computes whose last four columns are zero, at the same scale."""
    for slot in "ABC":
        net = supernet_layer(linear(True), composition, fill)
        net.path["default"] = LayerPath(((slot, SlotSpec("lora", 4, SCALE)),))
        small, x = net(rows(net)), rows(net)
        net.path["default"] = LayerPath(((slot, SlotSpec("lora", 8, SCALE)),))
        assert not torch.allclose(net(x), small, atol=1e-4)
        with torch.no_grad():
            getattr(net, f"slot_{slot}")["default"].down[:, 4:] = 0
        torch.testing.assert_close(net(x), small, rtol=1e-5, atol=1e-6)


def test_slot_d_is_there_only_with_a_bias(fill: Fill) -> None:
    for has_bias in (True, False):
        net = supernet_layer(linear(has_bias), "product", fill)
        held = {s: sorted(n for n, _ in getattr(net, f"slot_{s}").named_parameters()) for s in SLOTS}
        assert held["D"] == (["default.scalar", "default.vector"] if has_bias else [])
        assert held["A"] == held["B"] == [f"default.{name}" for name in ("down", "scalar", "up", "vector")]
        assert held["C"] == ["default.down", "default.up", "default.vector"]
        assert (net.path["default"]["D"].mode == "none") != has_bias


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("composition", ["product", "hadamard"])
def test_gradient_checkpointing_gives_the_same_gradients(composition: str, use_reentrant: bool, fill: Fill) -> None:
    net = supernet_layer(linear(True), composition, fill, dropout=0.2)
    for number in range(10):
        net.path["default"] = draw_path(CHOICES, True, number)
        expected, wanted = step(net)
        y, gradients = step(net, lambda layer, x: checkpoint(layer, x, use_reentrant=use_reentrant))
        assert torch.equal(y, expected) and gradients.keys() == wanted.keys()
        assert all(torch.equal(gradient, wanted[name]) for name, gradient in gradients.items())


def test_every_parameter_of_a_supernet_has_a_learning_rate(llama: Llama) -> None:
    model = glora(llama(attention_bias=True), supernet={"ranks": [4, 2]})
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 2 * (4 * 15 + 3 * 13)
    pairs = list(lr_factors(model, {"B": 0.7}, 16.0))
    assert sorted(key for key, _ in pairs) == sorted(names)
    expected = DEFAULT_LR_FACTORS | {"B": 0.7}
    for key, factor in pairs:
        slot = names[key].partition("slot_")[2][0]
        assert factor == expected[slot] * (16.0 if names[key].endswith("down") else 1.0)


def test_choices_are_the_largest_first() -> None:
    found = slot_choices({"B": ["none", "lora"], "D": ["scalar"]}, [2, 16, 4, 2], alpha=8.0)
    assert found["B"] == (*(SlotSpec("lora", rank, 0.5) for rank in (16, 4, 2)), SlotSpec("none"))
    assert found["D"] == (SlotSpec("scalar"),)
    for slot in "ACE":
        assert tuple(dict.fromkeys(spec.mode for spec in found[slot])) == SUPERNET_MODES[slot]


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        ({"F": ["lora"]}, "Unknown GLoRA slot 'F'; there are A, B, C, D and E."),
        ({"A": ["lora", "vectr"]}, "Slot A has no mode 'vectr'; it has: lora, block, vector, scalar, none. Did you "
         "mean 'vector'?"),
        ({"C": ["scalar"]}, "Slot C has no mode 'scalar'; it has: lora, vector, none."),
        ({"E": []}, "Slot E has no mode left; it has: vector, scalar, none."),
    ],
)  # fmt: skip
def test_wrong_choices_are_named_with_the_nearest(modes: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        slot_choices(modes, [8], 16.0)
