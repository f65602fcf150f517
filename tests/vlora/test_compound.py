"""How many parameters there are, and every way in which layers may not be able to share."""

from typing import Any

import pytest
import torch
from torch import nn

from glora_llm.errors import UserError
from glora_llm.vlora import (
    Count,
    VLoRAConfig,
    allocated,
    from_dense,
    make_compounds,
    matrix_count,
    parameter_count,
    vlora_layers,
)
from tests.vlora.conftest import shared, small_llama, small_vit, stack


def total(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())


@pytest.mark.parametrize(
    "keys",
    [
        {"rank": 2},
        {"rank": 3, "layers_per_compound": 2, "topology": "star"},
        {"rank": 1, "layers_per_compound": None, "targets": ["up_proj", "self_attn.q_proj", "fc1"]},
        {"rank": 2, "layers_per_compound": 1},
    ],
)
@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_the_count_is_what_is_allocated(kind: str, keys: dict[str, Any]) -> None:
    model = small_llama(attention_bias=True) if kind == "llama" else small_vit()
    layers = model.model.layers if kind == "llama" else model.vit.layers
    if "targets" in keys:
        there = {"llama": ["up_proj", "self_attn.q_proj"], "vit": ["fc1"]}
        keys = keys | {"targets": there[kind]}
    config = VLoRAConfig(**keys)
    before = total(model)
    counts = parameter_count(model, layers, config)
    assert total(model) == before, "counting changes nothing"
    whole = sum(counts.values(), Count())
    make_compounds(model, layers, config)
    assert total(model) == before - whole.dense + whole.total
    assert allocated(model) == (whole if config.layers_per_compound != 1 else Count())
    assert len(counts) == {"llama": 7, "vit": 6}[kind] if config.targets is None else len(config.targets)


def test_ranks_by_linear() -> None:
    model = small_llama()
    config = VLoRAConfig(rank={"q_proj": 1, "mlp.up_proj": 3}, targets=["q_proj", "up_proj"])
    counts = parameter_count(model, model.model.layers, config)
    assert counts["self_attn.q_proj"].increments == 3 * 1 * 32 and counts["mlp.up_proj"].increments == 3 * 3 * 40
    make_compounds(model, model.model.layers, config)
    assert {layer.rank for layer in vlora_layers(model).values()} == {1, 3}


def test_vit_b_has_the_papers_share() -> None:
    """ViT-B, k 4, r 8: about 26 % of the dense linears (VLORA.md), without biases."""
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    count = sum((matrix_count(o, i, 12, 4, 8) for o, i in shapes), Count())
    assert count.base == 3 * 7077888 and count.increments == 9 * 8 * (4 * 1536 + 2 * 3840)
    assert 0.26 < count.share < 0.27


def test_norms_biases_and_heads_stay_per_layer() -> None:
    model = small_vit()
    before = {name for name, _ in model.named_parameters()}
    shared(model, model.vit.layers)
    gone = before - {name for name, _ in model.named_parameters()}
    assert gone and all(name.endswith(("proj.weight", "fc1.weight", "fc2.weight")) for name in gone)
    assert all(".layers.1." in name or ".layers.3." in name for name in gone)


def odd_stack(number: int, module: nn.Module) -> Any:
    model = stack((6, 6), bias=False)
    model[number][0] = module
    return model


class Quantised(nn.Linear):
    """As bitsandbytes' Linear8bitLt: int8 values in the place of the weight."""

    def __init__(self) -> None:
        super().__init__(6, 6, bias=False)
        self.weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.int8), requires_grad=False)


class Other(nn.Linear):
    """A linear that may compute anything."""


def tied() -> Any:
    model = stack((6, 6))
    model[2][0].weight = model[0][0].weight
    return model


def done() -> Any:
    model = stack((6, 6))
    return make_compounds(model, list(model), VLoRAConfig(rank=2, layers_per_compound=2))


WIDE = nn.Linear(6, 8, bias=False, dtype=torch.float64)
BIASED = nn.Linear(6, 6, dtype=torch.float64)
SINGLE = nn.Linear(6, 6, bias=False)
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (lambda: stack((6, 6)), {"layers_per_compound": 3}, r"is 3, .* divide 4 layers\. Sizes that fit: 1, 2, 4"),
    (lambda: stack((6, 6)), {"rank": 7}, r"rank is 7 for '0', whose smaller side is 6.*at most 6"),
    (lambda: stack((6, 6)), {"rank": {"1": 2}}, r"rank has 0 entries for the linear '0': 1"),
    (lambda: stack((6, 6)), {"rank": {"0": 2, "9": 2}}, r"rank names '9', which is not shared; shared: 0"),
    (lambda: stack((6, 6)), {"targets": ["5"]}, r"No layer has a linear '5'; there is: 0"),
    (lambda: stack((6, 6)), {"targets": []}, r"No linear was chosen"),
    (lambda: odd_stack(2, WIDE), {}, r"'0' is \(8, 6\) float64 .* layer 2 and \(6, 6\) float64 .* layer 0"),
    (lambda: odd_stack(1, BIASED), {}, r"with bias in layer 1 and .* without bias in layer 0"),
    (lambda: odd_stack(3, SINGLE), {}, r"float32 on cpu .* in layer 3 and .*float64"),
    (lambda: odd_stack(1, Quantised()), {}, r"layer 1, '0': a Quantised is quantised.*without quantisation"),
    (lambda: odd_stack(1, Other(6, 6, False)), {}, r"layer 1, '0': a Other is more than an nn.Linear"),
    (lambda: odd_stack(1, nn.Identity()), {}, r"Layer 1 has no linear '0', which other layers have; it has: none"),
    (tied, {}, r"'0' has one weight for several layers already"),
    (done, {}, r"layer 1, '0': already a VLoRALinear\. Call to_dense"),
]


@pytest.mark.parametrize(("make", "keys", "message"), REFUSED, ids=[case[2][:40] for case in REFUSED])
def test_layers_that_cannot_share_are_refused_before_anything_changes(make: Any, keys: Any, message: str) -> None:
    model = make()
    before = list(model.modules())
    for function in (make_compounds, from_dense, parameter_count):
        with pytest.raises(UserError, match=message):
            function(model, list(model), VLoRAConfig(**{"rank": 2, **keys}))
    assert list(model.modules()) == before


def test_layers_must_be_of_the_model_and_alike_and_different() -> None:
    model, config = stack((6, 6)), VLoRAConfig(rank=2, layers_per_compound=1)
    for layers, message in (
        ([], "There are no layers"),
        (list(stack((6, 6))), "Layer 0 is no part of the model"),
        ([model[0], model[0][0]], "Layer 1 is a Linear and layer 0 a Sequential"),
        ([model[0], model[0]], "same layer is in the list twice"),
    ):
        with pytest.raises(UserError, match=message):
            make_compounds(model, layers, config)


def test_a_name_that_is_nearly_right_is_answered_with_the_right_one() -> None:
    model = small_llama()
    with pytest.raises(UserError, match=r"No layer has a linear 'q_prj'; there is: self_attn.q_proj, .*'q_proj'\?"):
        make_compounds(model, model.model.layers, VLoRAConfig(targets=["q_prj"]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"topology": "chian"}, r"topology is 'chian'; expected chain or star\. Did you mean 'chain'\?"),
        ({"base_gradient": "none"}, r"base_gradient is 'none'; expected all or first"),
        ({"start": "zero"}, r"start is 'zero'; expected paper or kaiming"),
        ({"form": "thick"}, r"form is 'thick'; expected auto or composed or thin"),
        ({"layers_per_compound": 0}, r"layers_per_compound is 0; expected 1 or more, or None"),
        ({"rank": 0}, r"rank is 0; expected 1 or more"),
        ({"rank": {"q": 0}}, r"rank is 0; expected 1 or more"),
        ({"alpha": 0.0}, r"alpha is 0.0; expected a number above 0, or None"),
        ({"targets": "q_proj"}, r"targets is the text 'q_proj'; expected a list of names: \['q_proj'\]"),
    ],
)
def test_a_wrong_setting_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VLoRAConfig(**keys)
