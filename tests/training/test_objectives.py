"""The objective is transformers' own loss; scores are what greedy decoding, free or over label words, would do."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from glora_llm.data.batch import collate, join
from glora_llm.data.label_trie import LabelTrie
from glora_llm.data.store import Row
from glora_llm.training import output_head
from glora_llm.training.objectives import CausalLMObjective, TokenScores

VOCABULARY = 48


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, vocab_size=VOCABULARY, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, use_cache=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def rows(lengths: Sequence[int] = (9, 4, 13, 6), seed: int = 0) -> list[Row]:
    """Samples of random tokens; about two thirds of them are targets."""
    draw = np.random.default_rng(seed)
    return [Row(draw.integers(0, VOCABULARY, n).astype(np.int32), draw.random(n) < 0.66, [0]) for n in lengths]


def gradients(model: LlamaForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return found


def of_transformers(model: LlamaForCausalLM, samples: Sequence[Row]) -> tuple[Tensor, int]:
    """Sum the loss that transformers computes of each sample alone, undone of its mean; return it and the targets."""
    total, count = torch.zeros(()), 0
    for sample in samples:
        ids = torch.from_numpy(sample.tokens.astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(sample.targets)[None], ids, -100)
        targets = int((labels[:, 1:] != -100).sum())
        total = total + model(input_ids=ids, labels=labels).loss * targets
        count += targets
    return total, count


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_it_is_transformers_loss_and_gradient(llama: LlamaForCausalLM, packed: bool) -> None:
    samples = rows()
    expected, count = of_transformers(llama, samples)
    batch = collate([join(samples)] if packed else samples, pad_id=7)
    assert batch["input_ids"].shape == ((1, 32) if packed else (4, 13)) and count > 10
    loss = CausalLMObjective(llama)(**batch)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    theirs, mine = gradients(llama, expected), gradients(llama, loss)
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_it_is_the_loss_of_one_call_with_the_same_positions(llama: LlamaForCausalLM) -> None:
    """The same tensors handed to transformers itself: packed rows of several samples, and padding."""
    first, second = rows((5, 8, 6)), rows((7, 3), seed=1)
    batch = collate([join(first), join(second)], pad_id=0)
    labels = torch.full_like(batch["input_ids"], -100)
    labels.view(-1)[batch["target_index"] + 1] = batch["targets"]
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        expected = llama(**inputs, labels=labels, use_cache=False).loss * len(batch["targets"])
        torch.testing.assert_close(CausalLMObjective(llama)(**batch), expected, rtol=1e-5, atol=1e-5)


def in_chunks(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Let the logits of so many tokens exist at once."""
    monkeypatch.setattr(output_head, "LOGITS_AT_ONCE", tokens * VOCABULARY)


@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_chunks_change_nothing(llama: LlamaForCausalLM, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = collate(rows(), pad_id=0, labels=LabelTrie.build([[3]]))
    objective = CausalLMObjective(llama)
    expected, scores = objective(**batch), objective(**batch, score=True)
    theirs = gradients(llama, expected)
    in_chunks(monkeypatch, size)
    loss, again = objective(**batch), objective(**batch, score=True)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    for name, gradient in gradients(llama, loss).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5, msg=name)
    for one, other in zip(scores, again, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_chunks_reach_a_head_that_is_trained_alone(llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """modules_to_save: [lm_head] under a frozen decoder: nothing that goes into a chunk needs a gradient."""
    head, batch, found = llama.lm_head.weight, collate(rows(), pad_id=0), []
    try:
        llama.requires_grad_(False)
        head.requires_grad_(True)
        for size in (10_000, 3):
            in_chunks(monkeypatch, size)
            head.grad = None
            CausalLMObjective(llama)(**batch).backward()
            assert head.grad is not None
            found.append(head.grad.clone())
    finally:
        llama.requires_grad_(True)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_token_losses_sum_to_the_loss(llama: LlamaForCausalLM) -> None:
    samples = rows()
    scores = CausalLMObjective(llama)(**collate(samples, pad_id=0), score=True)
    assert not scores.loss.requires_grad and not scores.among_labels.any()
    for number, sample in enumerate(samples):
        expected, count = of_transformers(llama, [sample])
        mine = scores.loss[scores.row == number]
        assert len(mine) == count
        torch.testing.assert_close(mine.sum(), expected.detach(), rtol=1e-5, atol=1e-5)


def answered(prompt: Sequence[int], answer: Sequence[int]) -> Row:
    tokens = np.array([*prompt, *answer], dtype=np.int32)
    return Row(tokens, np.arange(len(tokens)) >= len(prompt), [0])


def all_right(scores: TokenScores, column: Tensor, count: int) -> list[bool]:
    return [bool(column[scores.row == number].all()) for number in range(count)]


def test_a_row_is_right_when_greedy_generation_gives_it(llama: LlamaForCausalLM) -> None:
    prompts = [[1, 5, 9], [2, 40, 17, 33, 8], [3], [11, 12]]
    answers = []
    for prompt in prompts:
        told = llama.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6, pad_token_id=0)
        answers.append(told[0, len(prompt) :].tolist())
        assert len(answers[-1]) == 6
    objective = CausalLMObjective(llama)
    batch = collate([answered(*pair) for pair in zip(prompts, answers, strict=True)], pad_id=0)
    scores = objective(**batch, score=True)
    assert len(scores.row) == 24 and all_right(scores, scores.correct, 4) == [True] * 4
    for number, place in itertools.product(range(4), (0, 3, 5)):
        changed = [list(answer) for answer in answers]
        changed[number][place] = (changed[number][place] + 1) % VOCABULARY
        batch = collate([answered(*pair) for pair in zip(prompts, changed, strict=True)], pad_id=0)
        scores = objective(**batch, score=True)
        assert all_right(scores, scores.correct, 4) == [n != number for n in range(4)]
        assert not scores.correct[scores.row == number][place]


WORDS = [[5, 6, 1], [5, 7, 1], [8, 1], [8, 9, 1], [8, 9, 4, 1], [30, 1]]


@torch.no_grad()
def decoded_over_words(model: Any, prompt: Sequence[int]) -> tuple[list[int], bool]:
    """Decode greedily over whole words; return the word, and whether free decoding would have said it too."""
    said: list[int] = []
    free = True
    while said not in WORDS:
        logits = model(input_ids=torch.tensor([[*prompt, *said]])).logits[0, -1]
        candidates = {word[len(said)] for word in WORDS if word[: len(said)] == said}
        best = max(candidates, key=lambda token: float(logits[token]))
        free = free and int(logits.argmax()) == best
        said.append(best)
    return said, free


def test_among_labels_is_greedy_decoding_over_the_label_words(llama: LlamaForCausalLM) -> None:
    objective, trie = CausalLMObjective(llama), LabelTrie.build(WORDS)
    prompts = [[first, second, 20] for first in range(0, 48, 6) for second in (3, 29)]
    said, as_free = [], 0
    for prompt in prompts:
        word, free = decoded_over_words(llama, prompt)
        said.append(WORDS.index(word))
        as_free += free
        scores = objective(**collate([answered(prompt, other) for other in WORDS], 0, trie), score=True)
        assert all_right(scores, scores.among_labels, len(WORDS)) == [other == word for other in WORDS]
        assert all_right(scores, scores.correct, len(WORDS)) == [free and other == word for other in WORDS]
    assert len(set(said)) >= 3, "the model always says the same word: this shows little"
    assert as_free < len(prompts), "the most likely token was always one of a label"
