"""Whole models against their dense twins: outputs, every gradient, checkpointing, accumulation, saving."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from glora_llm.vlora import VLoRAConfig, VLoRALinear, make_compounds, vlora_layers
from tests.vlora.conftest import FORMS, IDS, gradients, same, shared, small_llama, stack, twin

Family = Callable[[], tuple[Any, Any, dict[str, Tensor]]]


def squares(output: Any) -> Tensor:
    total: Tensor = output.logits.square().mean()
    return total


@pytest.mark.parametrize(("topology", "base_gradient"), FORMS)
@pytest.mark.parametrize("form", ["composed", "thin"])
def test_a_model_is_its_dense_twin(family: Family, topology: str, base_gradient: str, form: str) -> None:
    model, layers, inputs = family()
    shared(model, layers, topology=topology, base_gradient=base_gradient, form=form, alpha=3.0)
    got, expected = model(**inputs), twin(model, **inputs)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
    same(gradients(model, squares(got)), gradients(model, squares(expected)))


def test_the_whole_model_as_one_compound_in_double(family: Family) -> None:
    model, layers, inputs = family()
    shared(model.double(), layers, layers_per_compound=None)
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    assert len(vlora_layers(model)) == 3 * (len(vlora_layers(layers[1])))
    got, expected = model(**inputs), twin(model, **inputs)
    same(gradients(model, squares(got)), gradients(model, squares(expected)), rtol=1e-9, atol=1e-11)


def test_star_with_a_detached_base_is_the_released_package() -> None:
    """vlora 0.1: one weight a compound; the first layer applies it, the others `base.detach() + B A`, own biases."""
    model = stack((7, 7))
    layers = list(model)
    make_compounds(
        model,
        layers,
        VLoRAConfig(layers_per_compound=2, rank=3, topology="star", base_gradient="first", start="kaiming"),
    )
    x = torch.randn(9, 7, dtype=torch.float64, requires_grad=True)
    own = dict(model.named_parameters())

    def released(x: Tensor) -> Tensor:
        for number in range(len(layers)):
            base = own[f"{number // 2 * 2}.0.weight"]
            if number % 2:
                base = base.detach() + own[f"{number}.0.increment_b"] @ own[f"{number}.0.increment_a"]
            x = torch.tanh(x @ base.t() + own[f"{number}.0.bias"])
        return x

    torch.testing.assert_close(model(x), released(x))
    same(gradients(model, model(x).sum()), gradients(model, released(x).sum()), rtol=1e-9, atol=1e-12)
    assert len(own) == 2 + 2 * 2 + 4


def test_kaiming_starts_both_factors_and_paper_keeps_the_layers_equal() -> None:
    bound = {"increment_a": 7**-0.5, "increment_b": 3**-0.5}
    for start in ("paper", "kaiming"):
        model = stack((7, 7))
        config = VLoRAConfig(layers_per_compound=2, rank=3, start=start)
        make_compounds(model, list(model), config, torch.Generator().manual_seed(0))
        for layer in vlora_layers(model).values():
            assert 0.5 * bound["increment_a"] < layer.increment_a.abs().max() <= bound["increment_a"]
            largest = layer.increment_b.abs().max()
            assert largest == 0 if start == "paper" else 0.5 * bound["increment_b"] < largest <= bound["increment_b"]
        assert torch.equal(model[1][0].weight, model[0][0].weight) == (start == "paper")


def test_a_seeded_generator_fixes_the_start() -> None:
    starts = []
    for seed in (0, 0, 1):
        model = stack()
        make_compounds(model, list(model), VLoRAConfig(rank=2), torch.Generator().manual_seed(seed))
        starts.append(model[1][0].increment_a.detach())
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_the_base_is_listed_once_and_by_the_first_layer() -> None:
    model = small_llama()
    names = set(dict(model.named_parameters()))
    shared(model, model.model.layers)
    now = dict(model.named_parameters())
    for number, there in ((0, True), (1, False), (2, True), (3, False)):
        name = f"model.layers.{number}.mlp.up_proj.weight"
        assert name in names and (name in now) == there == (name in model.state_dict())
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert len({id(value) for value in now.values()}) == len(list(model.parameters())) == len(model.state_dict())


def test_state_dict_roundtrip(tmp_path: Path) -> None:
    model, again = (shared(made, made.model.layers, seed) for made, seed in ((small_llama(), 1), (small_llama(), 2)))
    assert not torch.equal(model(IDS).logits, again(IDS).logits)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_a_copy_is_whole_and_shares_nothing() -> None:
    model = small_llama()
    shared(model, model.model.layers)
    again = copy.deepcopy(model)
    before = again(IDS).logits
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    assert torch.equal(again(IDS).logits, before) and before.abs().max() > 0
    assert again.model.layers[1].mlp.up_proj._base[0] is again.model.layers[0].mlp.up_proj


def test_moving_the_model_moves_what_its_layers_read() -> None:
    model = small_llama()
    shared(model, model.model.layers).to(torch.bfloat16)
    assert model(IDS).logits.dtype == torch.bfloat16
    assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", ["composed", "thin"])
def test_checkpointing_changes_no_gradient(family: Family, form: str, reentrant: bool) -> None:
    model, layers, inputs = family()
    shared(model, layers, form=form, layers_per_compound=None).train()
    expected = gradients(model, squares(model(**inputs)))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert all(layer.gradient_checkpointing for layer in layers)
    same(gradients(model, squares(model(**inputs))), expected, rtol=1e-5, atol=1e-6)


def test_autocast_with_checkpointing_follows_the_twin_under_autocast(family: Family) -> None:
    model, layers, inputs = family()
    shared(model, layers, form="composed").train()
    exact = gradients(model, squares(twin(model, **inputs)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = gradients(model, squares(twin(model, **inputs)))
        model.activation_checkpointing_enable({"use_reentrant": False})
        got = gradients(model, squares(model(**inputs)))
    assert got.keys() == exact.keys()
    errors, allowed = (sum(float((g[n] - exact[n]).square().sum()) for n in exact) ** 0.5 for g in (got, rough))
    assert 0 < errors < 1.3 * allowed


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    model = small_llama()
    shared(model, model.model.layers)
    whole = gradients(model, squares(model(IDS)))
    model.zero_grad()
    for row in IDS.split(1):
        (squares(model(row)) / len(IDS)).backward()
    same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, whole)


@pytest.mark.parametrize("frozen", ["base", "increments"])
def test_frozen_parts_stay_frozen_and_the_rest_trains_as_before(frozen: str) -> None:
    model = small_llama()
    shared(model, model.model.layers)
    every = gradients(model, squares(model(IDS)))
    for name, value in model.named_parameters():
        value.requires_grad_(("increment_" in name) == (frozen == "base"))
    got = gradients(model, squares(model(IDS)))
    same(got, {name: value for name, value in every.items() if ("increment_" in name) == (frozen == "base")})


def test_a_model_keeps_no_weight_for_backward_but_its_parameters() -> None:
    model = small_llama()
    shared(model, model.model.layers, layers_per_compound=None, form="composed")
    sizes = {tuple(layer.weight.shape) for layer in vlora_layers(model).values()}
    owned = {value.data_ptr() for value in model.parameters()}
    kept: list[Tensor] = []

    def pack(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        model(IDS)
    large = [value for value in kept if tuple(value.shape) in sizes or tuple(value.shape[::-1]) in sizes]
    assert large and all(value.data_ptr() in owned for value in large)


def test_layers_before_in_the_chain_learn_from_later_ones() -> None:
    """With B zero everywhere an increment's A has no gradient, and each B has one."""
    model = stack((6, 6))
    make_compounds(model, list(model), VLoRAConfig(rank=2, layers_per_compound=None))
    found = gradients(model, model(torch.randn(5, 6, dtype=torch.float64)).square().sum())
    for number in (1, 2, 3):
        assert found[f"{number}.0.increment_a"].abs().max() == 0 < found[f"{number}.0.increment_b"].abs().max()


def test_it_prints_what_it_is() -> None:
    model = stack((6, 6))
    make_compounds(model, list(model), VLoRAConfig(rank=2, layers_per_compound=None))
    assert isinstance(model[3][0], VLoRALinear)
    assert "rank=2, increments=3" in repr(model[3][0])


@pytest.mark.parametrize("form", ["composed", "thin"])
def test_a_compiled_model_is_one_graph_with_the_same_gradients(form: str) -> None:
    model = stack(dtype=torch.float32)
    shared(model, list(model), form=form, layers_per_compound=4)
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    expected = gradients(model, model(x).square().sum())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    same(gradients(model, compiled(x).square().sum()), expected)
