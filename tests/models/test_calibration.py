"""Products of inputs and gradients at outputs, against a loop over all tokens of a tiny LLaMA."""

import itertools
from typing import Any

import pytest
import torch

from glora_llm.errors import UserError
from glora_llm.models.calibration import LEAST, NOTHING, calibrate
from glora_llm.models.families import layers
from tests.models.small_models import build

LINEARS = ["self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"]
ROWS = [[1, 5, 9, 13, 17], [2, 3, 4], [7, 11, 40, 1, 1, 6]]
KEYS = list(itertools.product(range(2), LINEARS))


@pytest.fixture(scope="module")
def model() -> Any:
    made = build("llama", "eager")
    made.tie_weights()
    return made.requires_grad_(False)


def moved(model: Any, key: tuple[int, str], row: list[int], by: torch.Tensor) -> torch.Tensor:
    """The summed loss of a row where an output of one linear is moved by so much, (T, O), in double."""
    linear = layers(model)[key[0]].get_submodule(key[1])
    handle = linear.register_forward_hook(lambda _, __, out: out + by)
    try:
        logits = model(torch.tensor([row])).logits[0]
    finally:
        handle.remove()
    chosen = logits.log_softmax(-1)[range(len(row) - 1), row[1:]]
    return -chosen.sum()


def test_gradients_are_mean_squares_over_every_token(model: Any) -> None:
    found = calibrate(model, LINEARS, ROWS)
    assert set(found.gradients) == set(found.roots) == set(KEYS)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())
    twin = build("llama", "eager").double()
    for key in KEYS:
        linear: Any = layers(model)[key[0]].get_submodule(key[1])
        out_features = linear.out_features
        squares, tokens = torch.zeros(out_features, dtype=torch.float64), sum(map(len, ROWS))
        for row in ROWS:
            zero = torch.zeros(1, len(row), out_features, dtype=torch.float64, requires_grad=True)
            (gradient,) = torch.autograd.grad(moved(twin, key, row, zero), zero)
            for token in range(len(row)):
                squares += gradient[0, token] ** 2
        expected = (squares / tokens).clamp(min=LEAST * float(squares.mean()) / tokens)
        torch.testing.assert_close(found.gradients[key].double().square(), expected, rtol=1e-3, atol=0)
        assert expected.min() > 0


def test_inputs_are_products_over_all_tokens_and_those_of_different_ones_are_shrunk(model: Any) -> None:
    names = ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj"]
    found, tokens = calibrate(model, names, ROWS), sum(map(len, ROWS))
    assert len({id(moments) for moments in found.roots.values()}) == 2 * 3  # q_proj and v_proj get the same
    for key in itertools.product(range(2), names):
        seen: list[torch.Tensor] = []
        linear = layers(model)[key[0]].get_submodule(key[1])
        handle = linear.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[0][0]))
        with torch.no_grad():
            for row in ROWS:
                model(torch.tensor([row]))
        handle.remove()
        x = torch.cat(seen).double()
        expected = x.T @ x / tokens * (tokens / (tokens + x.shape[1]))
        squares = x.square().mean(0)
        expected.diagonal().copy_(squares.clamp(min=LEAST * float(squares.mean())))
        root = found.roots[key].double()
        torch.testing.assert_close(root @ root.T, expected, rtol=1e-4, atol=1e-6)
        assert torch.linalg.eigvalsh(expected).min() > 0  # of 14 tokens and 24 or 32 inputs


def test_rows_without_a_next_token_and_no_rows(model: Any) -> None:
    alone = calibrate(model, LINEARS, [[5], [7]])
    assert set(alone.roots) == set(KEYS) and not alone.gradients
    mixed, longer = calibrate(model, LINEARS, [[5], ROWS[0]]), calibrate(model, LINEARS, ROWS[:1])
    for key in KEYS:
        torch.testing.assert_close(mixed.gradients[key].square(), longer.gradients[key].square() * 5 / 6)
    nothing = calibrate(model, LINEARS, [])
    assert not nothing.roots and not nothing.gradients


def test_gradients_that_are_not_finite_are_refused() -> None:
    broken = build("llama", "eager").requires_grad_(False)
    broken.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(UserError, match=r"in layer \d, or gradients at its outputs, are not finite"):
        calibrate(broken, LINEARS, ROWS)


def test_a_linear_without_inputs_or_gradients_is_measured_as_next_to_nothing() -> None:
    dead = build("llama", "eager").requires_grad_(False)
    first: Any = layers(dead)[0]
    first.mlp.down_proj.weight.zero_()
    first.mlp.up_proj.weight.zero_()
    found = calibrate(dead, ["mlp.up_proj", "mlp.down_proj"], ROWS)
    assert float(found.gradients[0, "mlp.up_proj"].max()) == pytest.approx(NOTHING**0.5)
    torch.testing.assert_close(found.roots[0, "mlp.down_proj"], NOTHING**0.5 * torch.eye(24), rtol=1e-5, atol=0)


def test_a_model_with_tied_embeddings_and_one_that_learns(model: Any) -> None:
    """Weights that could learn get no gradient, and give the same figures."""
    learning = build("llama", "sdpa")
    learning.lm_head.weight = learning.get_input_embeddings().weight
    tied = calibrate(learning.requires_grad_(False), LINEARS, ROWS).gradients
    free = calibrate(learning.requires_grad_(True), LINEARS, ROWS).gradients
    assert all(parameter.grad is None for parameter in learning.parameters())
    for key in KEYS:
        torch.testing.assert_close(free[key], tied[key], rtol=1e-4, atol=0)
        assert tied[key].min() > 0
