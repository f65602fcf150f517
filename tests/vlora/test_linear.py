"""y = x W' + b with W = W_base + s sum_j B_j A_j against a naive version: outputs and every gradient, in float64."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from glora_llm.schema.vlora import GAINS
from glora_llm.vlora import Parts
from glora_llm.vlora.linear import is_composed_cheaper, is_full_gradient_cheaper, vlora_linear

I, O, R, SCALE = 7, 5, 2, 1.5  # noqa: E741 - the letters of the formula
CASES = [(form, count, gradient) for form in ("composed", "thin") for count in (1, 3) for gradient in (True, False)]


def parameters(
    count: int, bias: bool = True, dtype: torch.dtype = torch.float64, rows: int = 6, gains: Sequence[str] = ()
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    lengths = {"row": O, "column": I, "diagonal": min(O, I)}
    made = {"x": normal(2, rows // 2, I), "base": normal(O, I), "bias": normal(O) if bias else None, "scale": SCALE}
    made |= {gain: normal(lengths[gain]) for gain in gains}
    return made | {"ups": [normal(O, R) for _ in range(count)], "downs": [normal(R, I) for _ in range(count)]}


def shared_linear(p: dict[str, Any], **keys: Any) -> Tensor:
    gains = (None if gain not in p else p[gain] + (gain != "diagonal") for gain in GAINS)
    return vlora_linear(p["x"], Parts(p["base"], p["ups"], p["downs"], *gains), p["bias"], p["scale"], **keys)


def naive(p: dict[str, Any], base_gradient: bool) -> Tensor:
    weight = p["base"] if base_gradient else p["base"].detach()
    if "row" in p:
        weight = weight * (1 + p["row"])[:, None]
    if "column" in p:
        weight = weight * (1 + p["column"])
    for up, down in zip(p["ups"], p["downs"], strict=True):
        weight = weight + SCALE * (up @ down)
    if "diagonal" in p:
        weight = weight + torch.eye(O, I, dtype=weight.dtype)[: len(p["diagonal"])] * p["diagonal"][:, None]
    y: Tensor = p["x"] @ weight.t() + (0 if p["bias"] is None else p["bias"])
    return y


def tensors(p: dict[str, Any]) -> list[Tensor]:
    every = (p["x"], p["base"], p["bias"], *p["ups"], *p["downs"], *(p.get(gain) for gain in GAINS))
    return [value for value in every if value is not None]


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor | None]:
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype)
    return list(torch.autograd.grad(y, inputs, upstream, allow_unused=True))


@pytest.mark.parametrize(("form", "count", "base_gradient"), CASES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [2, 6, 40])
def test_outputs_and_gradients_are_the_naive_ones(
    form: str, count: int, base_gradient: bool, bias: bool, rows: int
) -> None:
    p = parameters(count, bias, rows=rows)
    y, expected = shared_linear(p, base_gradient=base_gradient, form=form), naive(p, base_gradient)
    torch.testing.assert_close(y, expected)
    for got, wanted in zip(gradients(y, tensors(p)), gradients(expected, tensors(p)), strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("form", "count", "base_gradient"), CASES)
def test_gradcheck(form: str, count: int, base_gradient: bool) -> None:
    p = parameters(count)
    inputs = [value for value in tensors(p) if base_gradient or value is not p["base"]]

    def function(*_: Tensor) -> Tensor:
        return shared_linear(p, base_gradient=base_gradient, form=form)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("gains", [["row"], ["column"], ["diagonal"], GAINS], ids=str)
@pytest.mark.parametrize(("form", "count", "base_gradient"), CASES)
def test_gains_and_a_diagonal_are_the_naive_ones(
    form: str, count: int, base_gradient: bool, gains: Sequence[str]
) -> None:
    for bias, rows in ((True, 6), (False, 40)):
        p = parameters(count, bias, rows=rows, gains=gains)
        y, expected = shared_linear(p, base_gradient=base_gradient, form=form), naive(p, base_gradient)
        torch.testing.assert_close(y, expected)
        for got, wanted in zip(gradients(y, tensors(p)), gradients(expected, tensors(p)), strict=True):
            assert (got is None) == (wanted is None)
            if got is not None:
                torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("form", ["composed", "thin"])
@pytest.mark.parametrize("frozen", ["x", "base", "bias", "factors", "one factor", "all but x"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(form: str, frozen: str) -> None:
    p = parameters(3)
    factors = [*p["ups"], *p["downs"]]
    named = {"x": [p["x"]], "base": [p["base"]], "bias": [p["bias"]], "factors": factors, "one factor": factors[:1]}
    for value in named.get(frozen, [p["base"], p["bias"], *factors]):
        value.requires_grad_(False)
    wanted = [value for value in tensors(p) if value.requires_grad]
    y, expected = shared_linear(p, form=form), naive(p, True)
    for got, value in zip(gradients(y, wanted), gradients(expected, wanted), strict=True):
        torch.testing.assert_close(got, value)


def test_gradients_of_the_increments_through_dw_and_thin_agree_where_the_base_is_detached() -> None:
    """Many rows and a large rank: the rule takes the way over dW, which must not reach the base."""
    assert is_full_gradient_cheaper(rows=40, out_features=O, in_features=I, rank=3 * R)
    assert not is_full_gradient_cheaper(rows=40, out_features=O, in_features=I, rank=1)
    assert not is_full_gradient_cheaper(rows=4096, out_features=768, in_features=768, rank=24)


def test_the_rule_is_half_the_width_of_a_square_matrix() -> None:
    assert not is_composed_cheaper(384, 768, 768) and is_composed_cheaper(385, 768, 768)
    assert not is_composed_cheaper(1, 4096, 11008)
    assert not is_composed_cheaper(768, 768, 768, increments_alone=True)
    assert is_composed_cheaper(769, 768, 768, increments_alone=True)


@pytest.mark.parametrize("rows", [2, 40])
def test_auto_takes_the_form_that_the_rule_names(rows: int) -> None:
    """What is kept tells the form: only thin keeps U, (T, R)."""
    for base_gradient in (True, False):
        p = parameters(3, rows=rows)
        kept: list[Tensor] = []
        with saved_tensors_hooks(lambda value, kept=kept: kept.append(value) or value, lambda value: value):  # type: ignore[misc]
            shared_linear(p, base_gradient=base_gradient)
        thin = any(value.shape == (rows // 2 * 2, 3 * R) for value in kept)
        assert thin == (not is_composed_cheaper(rows // 2 * 2, O, I, increments_alone=not base_gradient))


@pytest.mark.parametrize("form", ["composed", "thin"])
def test_nothing_of_the_size_of_the_weight_is_kept_but_the_base_itself(form: str) -> None:
    p = parameters(3)
    kept: list[Tensor] = []

    def pack(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        y = shared_linear(p, form=form)
    large = [value for value in kept if value.shape == (O, I)]
    assert len(kept) >= 3 and all(value.data_ptr() == p["base"].data_ptr() for value in large)
    y.sum().backward()
    assert p["base"].grad is not None


@pytest.mark.parametrize("form", ["composed", "thin"])
def test_a_weight_that_changed_between_forward_and_backward_is_an_error(form: str) -> None:
    p = parameters(2)
    y = shared_linear(p, form=form, base_gradient=False)
    with torch.no_grad():
        p["base"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("form", ["composed", "thin"])
def test_autocast_computes_in_bfloat16_and_leaves_gradients_in_the_parameters_dtype(form: str) -> None:
    p = parameters(3, dtype=torch.float32, rows=40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, rough = shared_linear(p, form=form), naive(p, True)
    exact = naive(p, True)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.03, atol=0.3)
    assert (y - exact).norm() <= 1.2 * (rough - exact).norm()
    for got, wanted in zip(gradients(y.float(), tensors(p)), gradients(exact, tensors(p)), strict=True):
        assert got is not None and wanted is not None and got.dtype == torch.float32
        assert (got - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("form", ["composed", "thin"])
def test_backward_inside_autocast_is_the_same(form: str) -> None:
    p = parameters(2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradients(shared_linear(p, form=form), tensors(p))
        y = shared_linear(p, form=form)
    for got, wanted in zip(inside, gradients(y, tensors(p)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("gains", [[], GAINS], ids=str)
def test_bfloat16_parameters(gains: Sequence[str]) -> None:
    p = parameters(2, dtype=torch.bfloat16, rows=40, gains=gains)
    exact = {key: value.double() if isinstance(value, Tensor) else value for key, value in p.items()}
    exact |= {key: [value.double() for value in p[key]] for key in ("ups", "downs")}
    for form in ("composed", "thin"):
        y = shared_linear(p, form=form)
        assert y.dtype == torch.bfloat16
        assert (y - naive(exact, True)).norm() < 0.01 * y.norm()
        assert all(g is not None and g.dtype == torch.bfloat16 for g in gradients(y, tensors(p)))
