"""PEFT's own GLoRA, LoRA, rsLoRA and HiRA, with the same values in their parameters, compute what this package does."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from peft import GloraConfig, HiraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

from glora_llm.glora import GLoRAConfig, GLoRALinear
from glora_llm.schema.slots import PRESET_COMPOSITION, PRESETS

I, O, R, TOKENS = 7, 5, 3, 6  # noqa: E741 - the letters of the formula
MODES = {"lora": "lora", "vector": "vector", "constant": "scalar", "none": "none"}  # PEFT's word -> ours
PEFT_PATHS = list(product(MODES, ("lora", "vector", "none"), ("vector", "constant", "none")))
Pairs = list[tuple[nn.Parameter, nn.Parameter]]


class OneLinear(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(I, O, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def adapted(config: Any, bias: bool) -> Any:
    return get_peft_model(OneLinear(bias), config)


def layer_of(model: Any) -> Any:
    return model.get_base_model().linear


def ours(slots: dict[str, Any], composition: str, bias: bool = True, **keys: Any) -> Any:
    settings = {"rank": R, "alpha": float(R), "composition": composition, **keys}
    return adapted(GLoRAConfig(target_modules=["linear"], slots=slots, **settings), bias)


def rows() -> Tensor:
    return torch.randn(2, TOKENS, I, generator=torch.Generator().manual_seed(1))


def fill_both(pairs: Pairs) -> None:
    """Give PEFT's parameter (first) a seeded value, and ours the same one in its own shape."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for theirs, own in pairs:
            theirs.copy_(torch.randn(theirs.shape, generator=generator))
            own.copy_(theirs.reshape(own.shape))


def glora_pairs(theirs: Any, own: GLoRALinear) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """PEFT's Xd, Xu, X beside our down, up, vector or scalar."""
    for slot in "ABCDE":
        stored = dict(getattr(theirs, f"glora_{slot}")["default"].named_parameters())
        modules = getattr(own, f"slot_{slot}")
        if not stored:
            assert "default" not in modules
        elif "Xd" in stored:
            yield stored["Xd"], modules["default"].down
            yield stored["Xu"], modules["default"].up
        else:
            yield stored["X"], next(iter(modules["default"].parameters()))


def require_same(theirs: Any, own: Any, pairs: Pairs) -> None:
    """Same output, same gradient of x and of every parameter, same merged weight and bias."""
    x = rows().requires_grad_()
    before = own(x)
    fill_both(pairs)
    outputs = [theirs(x), own(x)]
    assert not pairs or not torch.allclose(outputs[1], before)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    upstream = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(3))
    for place in range(len(pairs) + 1):
        sides = [x, x] if place == 0 else list(pairs[place - 1])
        found = [
            torch.autograd.grad(output, side, upstream, retain_graph=True)[0]
            for output, side in zip(outputs, sides, strict=True)
        ]
        torch.testing.assert_close(found[1], found[0].reshape(found[1].shape), rtol=1e-4, atol=1e-4)
    merged = [model.merge_and_unload().linear for model in (theirs, own)]
    torch.testing.assert_close(merged[1].weight, merged[0].weight, rtol=1e-5, atol=1e-5)
    assert (merged[0].bias is None) == (merged[1].bias is None)
    if merged[0].bias is not None:
        torch.testing.assert_close(merged[1].bias, merged[0].bias, rtol=1e-5, atol=1e-5)


def test_every_path_of_peft_glora() -> None:
    compared = 0
    for a_b, c, d_e in PEFT_PATHS:
        config = GloraConfig(r=R, target_modules=["linear"], config_A_B=a_b, config_C=c, config_D_E=d_e)
        theirs = adapted(config, bias=True)
        modes = {"A": a_b, "B": a_b, "C": c, "D": d_e, "E": d_e}
        own = ours({slot: MODES[mode] for slot, mode in modes.items()}, "hadamard")
        pairs = list(glora_pairs(layer_of(theirs), layer_of(own)))
        assert bool(pairs) == ((a_b, c, d_e) != ("none",) * 3)
        require_same(theirs, own, pairs)
        compared += 1
    assert compared == 4 * 3 * 3


@pytest.mark.parametrize(("c", "d_e", "slots"), [("vector", "none", {"C"}), ("none", "vector", {"E"})])
def test_peft_drops_c_and_e_without_a_bias_and_we_do_not(c: str, d_e: str, slots: set[str]) -> None:
    config = GloraConfig(r=R, target_modules=["linear"], config_A_B="vector", config_C=c, config_D_E=d_e)
    theirs = adapted(config, bias=False)
    own = ours({"A": "vector", "B": "vector"} | dict.fromkeys(slots, "vector"), "hadamard", bias=False)
    for slot in "CDE":
        assert not list(getattr(layer_of(theirs), f"glora_{slot}")["default"].parameters())
    x = rows()
    unchanged = own(x)
    with torch.no_grad():
        for slot in slots:
            getattr(layer_of(own), f"slot_{slot}")["default"].vector.fill_(1.0)
    torch.testing.assert_close(theirs(x), unchanged)
    w0 = layer_of(own).get_base_layer().weight
    shift = w0.sum(1) if slots == {"C"} else torch.ones(O)  # W0 C of C = 1, or E = 1
    torch.testing.assert_close(own(x), unchanged + shift)


def lora_pairs(theirs: Any, own: Any) -> Pairs:
    mode = own.slot_B["default"]
    return [(theirs.lora_A["default"].weight, mode.up), (theirs.lora_B["default"].weight, mode.down)]


def hira_pairs(theirs: Any, own: Any) -> Pairs:
    mode = own.slot_A["default"]
    return [(theirs.hira_A["default"], mode.up), (theirs.hira_B["default"], mode.down)]


def preset(name: str, bias: bool, **keys: Any) -> Any:
    return ours(dict(PRESETS[name]), PRESET_COMPOSITION.get(name, "product"), bias, **keys)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stabilised", [False, True])
def test_preset_lora_is_peft_lora(stabilised: bool, bias: bool) -> None:
    config = LoraConfig(r=R, lora_alpha=16, target_modules=["linear"], use_rslora=stabilised)
    theirs = adapted(config, bias)
    own = preset("lora", bias, alpha=16.0, rank_stabilized=stabilised)
    require_same(theirs, own, lora_pairs(layer_of(theirs), layer_of(own)))


@pytest.mark.parametrize("bias", [True, False])
def test_preset_hira_is_peft_hira(bias: bool) -> None:
    theirs, own = adapted(HiraConfig(r=R, target_modules=["linear"]), bias), preset("hira", bias)
    require_same(theirs, own, hira_pairs(layer_of(theirs), layer_of(own)))


@pytest.mark.parametrize(
    ("name", "config", "pairs"),
    [
        ("lora", LoraConfig(r=R, lora_alpha=R, target_modules=["linear"], lora_dropout=0.5), lora_pairs),
        ("hira", HiraConfig(r=R, target_modules=["linear"], hira_dropout=0.5), hira_pairs),
    ],
)
def test_dropout_falls_where_peft_drops(name: str, config: Any, pairs: Callable[[Any, Any], Pairs]) -> None:
    theirs, own = adapted(config, bias=True).train(), preset(name, bias=True, dropout=0.5).train()
    fill_both(pairs(layer_of(theirs), layer_of(own)))
    outputs = []
    for model in (theirs, own):
        torch.manual_seed(7)
        outputs.append(model(rows()))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs[1], own.eval()(rows()))


def test_the_two_gloras_have_types_of_their_own() -> None:
    assert GLoRAConfig().peft_type.value == "GLORA_LLM" and GloraConfig().peft_type.value == "GLORA"
