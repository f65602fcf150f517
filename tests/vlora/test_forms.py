"""Forms of sharing beside the paper's: gains, sizes by kind of linear, cycles, a base of its own, other starts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glora_llm.errors import UserError
from glora_llm.models.folder import read_sharing, write_sharing
from glora_llm.schema.vlora import GAINS
from glora_llm.vlora import (
    Count,
    VLoRAConfig,
    VLoRALinear,
    allocated,
    compositions,
    from_dense,
    increments,
    m_steps,
    make_compounds,
    matrix_count,
    parameter_count,
    to_dense,
    vlora_layers,
)
from tests.vlora.conftest import IDS, gradients, same, shared, small_llama, stack, twin, twin_weights

BY_KIND = {"q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 4, "gate_proj": 2, "up_proj": 2, "down_proj": 1}
FORMS: dict[str, dict[str, Any]] = {
    "row": {"gains": ["row"]},
    "column": {"gains": ["column"], "layers_per_compound": 4},
    "diagonal": {"gains": ["diagonal"], "layers_per_compound": 4},
    "all gains": {"gains": list(GAINS), "layers_per_compound": 4, "alpha": 3.0},
    "star": {"gains": list(GAINS), "topology": "star", "base_gradient": "first", "layers_per_compound": 4},
    "by linear": {"gains": {"q_proj": ["diagonal"], "down_proj": ["row", "column"]}},
    "kinds": {"layers_per_compound": BY_KIND},
    "cycle": {"sharing": "cycle", "gains": ["row"]},
    "all": {"increments": "all", "gains": list(GAINS), "layers_per_compound": 4},
    "all, star, cycle": {"increments": "all", "topology": "star", "sharing": "cycle", "layers_per_compound": BY_KIND},
}


def loss(output: Any) -> Tensor:
    total: Tensor = output.logits.square().mean()
    return total


def made(keys: dict[str, Any], **more: Any) -> Any:
    model = small_llama().double()
    return shared(model, model.model.layers, **keys, **more)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("form", ["composed", "thin"])
def test_a_form_is_its_dense_twin_in_values_and_gradients(name: str, form: str) -> None:
    """In float64, with a checkpointed backward pass too."""
    model = made(FORMS[name], form=form)
    got, expected = model(IDS), twin(model, IDS)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-9, atol=1e-11)
    wanted = gradients(model, loss(expected))
    same(gradients(model, loss(got)), wanted, rtol=1e-9, atol=1e-11)
    model.activation_checkpointing_enable({"use_reentrant": False})
    same(gradients(model.train(), loss(model(IDS))), wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_a_form_is_counted_composed_and_written_out(name: str) -> None:
    keys = {"rank": 2, "layers_per_compound": 2, **FORMS[name]}
    plain = small_llama()
    before = sum(value.numel() for value in plain.parameters())
    counts = parameter_count(plain, plain.model.layers, VLoRAConfig(**keys))
    model = made(FORMS[name])
    whole = sum(counts.values(), Count())
    assert sum(value.numel() for value in model.parameters()) == before - whole.dense + whole.total
    wanted = twin_weights(model)
    if not isinstance(keys["layers_per_compound"], dict):  # else layers that share with none are not counted as shared
        assert allocated(model) == whole
    values = dict(model.named_parameters())
    for key, parts in compositions(model).items():
        torch.testing.assert_close(parts.compose(values.__getitem__), wanted[key.removesuffix(".weight")])
    sizes, by_layer = increments(model), m_steps(model.model.layers)
    for number, size in by_layer.items():
        squares = [one.norm**2 for key, one in sizes.items() if f"layers.{number}." in key]
        assert size == pytest.approx(sum(squares) ** 0.5)
    logits = model(IDS).logits
    to_dense(model)
    assert not vlora_layers(model) and {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert not [key for key, _ in model.named_parameters() if "increment" in key or "compound" in key]
    torch.testing.assert_close(model(IDS).logits, logits)


@torch.no_grad()
def test_the_size_of_an_increment_with_gains_is_what_it_adds() -> None:
    for topology in ("chain", "star"):
        model = stack((6, 7))
        shared(model, list(model), gains=list(GAINS), layers_per_compound=4, topology=topology)
        sizes = increments(model)
        for number in (1, 2, 3):
            before = model[number - 1][0].weight if topology == "chain" else model[0][0].weight
            added = (model[number][0].weight - before).norm()
            assert sizes[f"{number}.0"].norm == pytest.approx(float(added), rel=1e-9)


def test_gains_start_without_effect_and_cost_little() -> None:
    plain, model = small_llama(), small_llama()
    config = VLoRAConfig(rank=2, gains=list(GAINS))
    make_compounds(model, model.model.layers, config)
    make_compounds(plain, plain.model.layers, VLoRAConfig(rank=2))
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
    count = matrix_count(256, 256, layers=12, size=4, rank=8, gains=GAINS)
    assert count.gains == 9 * 3 * 256 and 0 < count.gains < 0.01 * count.dense


def test_a_cycle_and_sizes_by_kind_share_what_they_say() -> None:
    model = stack((6, 6))
    make_compounds(model, list(model), VLoRAConfig(rank=1, layers_per_compound=2, sharing="cycle"))
    assert [type(layer[0]) for layer in model] == [nn.Linear, nn.Linear, VLoRALinear, VLoRALinear]
    assert model[2][0].base_owner is model[0][0] and model[3][0].base_owner is model[1][0]
    model = small_llama()
    make_compounds(model, model.model.layers, VLoRAConfig(rank=1, layers_per_compound=BY_KIND))
    found = [name.split(".")[2:] for name in vlora_layers(model)]
    assert [int(number) for number, *_, name in found if name == "q_proj"] == [1, 2, 3]
    assert [int(number) for number, *_, name in found if name == "up_proj"] == [1, 3]
    assert not [number for number, *_, name in found if name == "down_proj"]


@pytest.mark.parametrize("topology", ["chain", "star"])
@torch.no_grad()
def test_a_base_that_is_the_mean_keeps_the_outputs_at_full_rank_and_loses_less_below(topology: str) -> None:
    x = torch.randn(5, 6, dtype=torch.float64)
    keys: dict[str, Any] = {"increments": "all", "topology": topology}
    model = stack((6, 6))
    wanted, weights = model(x), [layer[0].weight.clone() for layer in model]
    fits = from_dense(model, list(model), VLoRAConfig(rank=6, **keys), base="mean")
    torch.testing.assert_close(model(x), wanted)
    torch.testing.assert_close(model[0][0].compound_base.weight, torch.stack(weights).mean(0))
    assert [fit.layer for fit in fits] == [0, 1, 2, 3] and max(fit.weight_error for fit in fits) < 1e-12
    lost = {}
    for base in ("first", "mean"):
        model = stack((6, 6))
        fits = from_dense(model, list(model), VLoRAConfig(rank=2, **keys), base=base)
        lost[base] = sum(fit.weight_error**2 for fit in fits)
    if topology == "star":
        assert lost["mean"] < lost["first"]


def test_a_mean_that_the_first_layer_cannot_leave_is_refused() -> None:
    model = stack((6, 6))
    before = list(model.modules())
    for base, said in (("mean", "base is 'mean', and with increments 'next'"), ("median", "expected first or mean")):
        with pytest.raises(UserError, match=said):
            from_dense(model, list(model), VLoRAConfig(rank=2), base=base)
    assert list(model.modules()) == before


def test_a_small_start_has_the_size_it_says_and_norms_spread() -> None:
    model = stack((64, 64), bias=False)
    config = VLoRAConfig(rank=4, start="small", start_scale=0.2, alpha=8.0, topology="star")
    make_compounds(model, list(model), config, torch.Generator().manual_seed(0))
    for size in increments(model).values():
        assert 0.15 < size.share < 0.25
    model = small_llama()
    config = VLoRAConfig(rank=2, norm_spread=0.1)
    make_compounds(model, model.model.layers, config, torch.Generator().manual_seed(0))
    gains = torch.stack([value for name, value in model.named_parameters() if "layernorm" in name])
    assert len(gains) == 8 and 0.07 < gains.std() < 0.13 and abs(gains.mean() - 1) < 0.05
    assert torch.equal(model.model.norm.weight, torch.ones(16)), "the last norm is no layer's"


def test_vlora_json_keeps_its_first_version_and_reads_old_and_new(tmp_path: Path) -> None:
    usual = VLoRAConfig(rank=3, topology="star")
    write_sharing(usual, tmp_path)
    first = json.loads((tmp_path / "vlora.json").read_text())
    assert "version" not in first and set(first) == {
        *("targets", "layers_per_compound", "rank", "alpha", "topology", "base_gradient", "start", "form")
    }
    assert read_sharing(tmp_path) == usual
    for keys in (*FORMS.values(), {"start": "small"}, {"norm_spread": 0.1}):
        write_sharing(VLoRAConfig(**keys), tmp_path)
        assert json.loads((tmp_path / "vlora.json").read_text())["version"] == 2
        assert read_sharing(tmp_path) == VLoRAConfig(**keys)
    for text in ('{"version": 3, "rank": 2}', '{"version": true}', '{"rnak": 2}'):
        (tmp_path / "vlora.json").write_text(text)
        with pytest.raises(UserError, match="does not say how layers share"):
            read_sharing(tmp_path)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"gains": {"9": ["row"]}}, r"gains names '9', which is not shared; shared: 0"),
    ({"gains": ["rows"]}, r"gains is 'rows'; expected row or column or diagonal\. Did you mean 'row'\?"),
    ({"gains": ["row", "row"]}, r"gains names one twice"),
    ({"gains": "row"}, r"gains is the text 'row'; expected a list"),
    ({"layers_per_compound": {"0": 3}}, r"layers_per_compound is 3 for '0', which does not divide 4 layers"),
    ({"layers_per_compound": {"1": 2}}, r"layers_per_compound has 0 entries for the linear '0'"),
    ({"layers_per_compound": {"0": 2, "1": 2}}, r"layers_per_compound names '1', which is not shared"),
    ({"layers_per_compound": {"0": 0}}, r"layers_per_compound is 0; expected 1 or more"),
    ({"sharing": "cycles"}, r"sharing is 'cycles'; expected adjacent or cycle\. Did you mean 'cycle'\?"),
    ({"increments": "none"}, r"increments is 'none'; expected next or all"),
    ({"increments": "all", "base_gradient": "first"}, r"base_gradient is 'first', and with increments 'all'"),
    ({"start_scale": 0.0}, r"start_scale is 0.0; expected a number above 0"),
    ({"norm_spread": 1.0}, r"norm_spread is 1.0; expected 0 or more, below 1"),
]


@pytest.mark.parametrize(("keys", "said"), REFUSED, ids=[said[:30] for _, said in REFUSED])
def test_a_form_that_cannot_be_is_refused_before_anything_changes(keys: dict[str, Any], said: str) -> None:
    model = stack((6, 6))
    before = list(model.modules())
    with pytest.raises(UserError, match=said):
        make_compounds(model, list(model), VLoRAConfig(**{"rank": 2, **keys}))
    assert list(model.modules()) == before
