"""Distillation: the loss and its gradients against a naive version in float64, in chunks and whole."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from glora_llm.data.batch import collate
from glora_llm.data.store import Row
from glora_llm.schema import DistillSection
from glora_llm.training import output_head
from glora_llm.training.distill import DistilledObjective
from glora_llm.training.objectives import CausalLMObjective

VOCABULARY = 40


def llama(seed: int, layers: int = 2, width: int = 16) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4, vocab_size=VOCABULARY,
        num_key_value_heads=2, initializer_range=0.3, attn_implementation="eager", tie_word_embeddings=seed == 0,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def batch_of(*lengths: int) -> dict[str, Any]:
    draw = np.random.default_rng(3)
    rows = [Row(draw.integers(3, VOCABULARY, n).astype(np.int32), np.arange(n) > n // 3, [0]) for n in lengths]
    return collate(rows, 0)


def naive(student: Any, teacher: Any, batch: dict[str, Any], settings: DistillSection) -> torch.Tensor:
    """Token by token, the formula of the docstring."""
    mine = student(input_ids=batch["input_ids"], output_hidden_states=True)
    theirs = teacher(input_ids=batch["input_ids"], output_hidden_states=True)
    width, total = batch["input_ids"].shape[1], torch.zeros((), dtype=torch.float64)
    t = settings.temperature
    for place, target in zip(batch["target_index"].tolist(), batch["targets"].tolist(), strict=True):
        row, column = divmod(place, width)
        z, u = mine.logits[row, column], theirs.logits[row, column]
        q, p = torch.softmax(z / t, 0), torch.softmax(u / t, 0)
        kl = sum(p[v] * (p[v].log() - q[v].log()) for v in range(VOCABULARY))
        total = total + (1 - settings.weight) * -torch.softmax(z, 0)[target].log() + settings.weight * t * t * kl
        if settings.states:
            pairs = [
                (h[row, column], g[row, column]) for h, g in zip(mine.hidden_states, theirs.hidden_states, strict=True)
            ]
            errors = [((h - g) ** 2).sum() / (g**2).sum() for h, g in pairs]
            total = total + settings.states * sum(errors) / len(errors)
    return total


@pytest.mark.parametrize("at_once", [2**26, 3 * VOCABULARY])
@pytest.mark.parametrize(
    "keys",
    [{}, {"weight": 1.0}, {"weight": 0.3, "temperature": 2.5}, {"weight": 0.7, "temperature": 2.0, "states": 0.4}],
)
def test_the_loss_and_its_gradients_are_the_naive_ones(
    keys: dict[str, Any], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_head, "LOGITS_AT_ONCE", at_once)
    # the objective computes losses in float32, as always; here all of it is float64
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    student, teacher = llama(0), llama(1).requires_grad_(False)
    settings, batch = DistillSection(teacher="x", **keys), batch_of(5, 9, 7)
    objective = DistilledObjective(CausalLMObjective(student), CausalLMObjective(teacher), settings).train()
    loss = objective(**batch)
    loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    expected = naive(student, teacher, batch, settings)
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
    assert got and all(grad.abs().max() > 0 for grad in got.values())
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-10, atol=1e-11)


def test_nothing_of_the_teacher_is_trained_saved_or_scored() -> None:
    student, teacher = CausalLMObjective(llama(0)), CausalLMObjective(llama(1, layers=3, width=32))
    objective = DistilledObjective(student, teacher, DistillSection(teacher="x"))
    assert [id(p) for p in objective.parameters()] == [id(p) for p in student.parameters()]
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.model.training
    batch = batch_of(6, 8)
    with torch.no_grad():
        scores, alone = objective(**batch, score=True), student(**batch, score=True)
    assert torch.equal(scores.loss, alone.loss) and not objective.sums.any()


def test_a_student_that_is_its_teacher_has_no_divergence() -> None:
    student, teacher = llama(0), llama(0)
    objective = DistilledObjective(
        CausalLMObjective(student), CausalLMObjective(teacher), DistillSection(teacher="x", weight=1.0, states=1.0)
    )
    assert abs(float(objective(**batch_of(5, 6)).detach())) < 1e-6


@pytest.mark.parametrize("is_teacher", [False, True])
def test_a_model_learns_from_itself_in_another_state(is_teacher: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a frozen copy of that state, which it leaves again; from the labels alone where it is in it."""
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    model, teacher = llama(0), llama(0).requires_grad_(False)
    weights, others = ([one.model.layers[0].mlp.down_proj.weight, one.lm_head.weight] for one in (model, teacher))
    for other in others:
        other.mul_(1.5)

    @contextmanager
    def as_teacher() -> Iterator[bool]:
        values = [weight.data for weight in weights]
        for weight in weights:
            weight.data = 1.5 * weight.data
        yield is_teacher
        for weight, value in zip(weights, values, strict=True):
            weight.data = value

    settings, batch = DistillSection(teacher="x", weight=0.7), batch_of(5, 9, 7)
    objective = DistilledObjective(CausalLMObjective(model), None, settings, as_teacher).train()
    assert objective.is_own_teacher and all(p.requires_grad for p in model.parameters())
    loss = objective(**batch)
    loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    other = DistilledObjective(CausalLMObjective(copy.deepcopy(teacher)), CausalLMObjective(teacher), settings).eval()
    expected = naive(model, teacher, batch, settings if not is_teacher else settings.model_copy(update={"weight": 0.0}))
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-10, atol=1e-11)
    with torch.no_grad():  # what a search asks for
        alone = other.student(**batch)
        assert torch.equal(other(**batch), alone)
