"""Prompts of PEFT on packed rows: loss, gradients and scores are those of PEFT's own forward pass, sample by sample."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from glora_llm.adapters.config import adapter_config
from glora_llm.adapters.inject import inject, without_adapter
from glora_llm.adapters.prompt_arguments import PROMPT_METHODS
from glora_llm.adapters.prompts import check_prefix
from glora_llm.adapters.weights import check_weights, load_start, save_adapter, trainables
from glora_llm.data.batch import collate, join
from glora_llm.data.store import Row
from glora_llm.errors import UserError
from glora_llm.evaluation.trained import _with_adapter
from glora_llm.models.attention import SEGMENTS, packed_arguments, register
from glora_llm.plan.trained_counts import trained_counts
from glora_llm.schema import AdapterSection
from glora_llm.training.objectives import CausalLMObjective, TokenScores
from tests.in_process import one_thread  # noqa: F401 - a fixture

WORDS, PROMPT = 64, 4
CASES = [*PROMPT_METHODS, "lstm"]
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
Make = Callable[[str], Any]


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register()


def section(name: str) -> AdapterSection:
    given: dict[str, Any] = {"num_virtual_tokens": PROMPT}
    if name == "lstm":
        given |= {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1}
    return AdapterSection(method="p_tuning" if name == "lstm" else name, peft=given)


def llama(attention: str = SEGMENTS, family: Any = LlamaForCausalLM, **more: Any) -> Any:
    """A float64 LLaMA whose heads share keys and values in pairs, frozen as `load_base` gives it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=WORDS, intermediate_size=64, use_cache=False, pad_token_id=0, **sizes, **more)
    return family._from_config(config, dtype=torch.float64, attn_implementation=attention).requires_grad_(False)


def gpt2(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    still = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(
        vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=64, use_cache=False, **still, **ends
    )
    return GPT2LMHeadModel._from_config(config, dtype=torch.float64, attn_implementation=attention).requires_grad_(
        False
    )


def samples() -> list[Row]:
    draw = np.random.default_rng(0)
    rows = []
    for length in (5, 9, 2, 7, 1, 6):
        targets = draw.random(length) < 0.7
        targets[0], targets[-1] = False, length > 1
        rows.append(Row(draw.integers(0, WORDS, length).astype(np.int32), targets, [0]))
    return rows


def trained(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def peft_loss(model: Any) -> Tensor:
    """Return PEFT's own loss, summed over the target tokens of the samples, one sample a forward pass."""
    total = torch.zeros((), dtype=torch.float64)
    for row in samples():
        if row.targets.any():
            ids = torch.from_numpy(row.tokens.astype(np.int64))[None]
            labels = torch.where(torch.from_numpy(row.targets)[None], ids, -100)
            found = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
            total = total + found.loss * int(row.targets.sum())
    return total


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("make", "attention", "checkpointed"),
    [(llama, SEGMENTS, True), (llama, "eager", False), (gpt2, "sdpa", True)],
    ids=["segments, checkpointed", "eager", "GPT-2, checkpointed"],
)
def test_packed_samples_are_those_of_peft(name: str, make: Make, attention: str, checkpointed: bool) -> None:
    """The rows hold 3, 2 and 1 samples, of unlike lengths, and padding."""
    base = make(attention)
    if checkpointed:
        base.activation_checkpointing_enable({"use_reentrant": False})
    model = inject(base, section(name), seed=0, steps=10)
    plain = make("eager")
    torch.manual_seed(0)
    peft = get_peft_model(plain, adapter_config(section(name), 0, 10))
    for ours, theirs in zip(trained(model), trained(peft), strict=True):
        assert torch.equal(ours, theirs)
        ours.data, theirs.data = ours.data.double(), theirs.data.double()
    expected = peft_loss(peft.train())
    expected.backward()

    rows = samples()
    packed = [join(rows[:3]), join(rows[3:5]), rows[5]]
    objective = CausalLMObjective(without_adapter(model), partial(packed_arguments, attention)).train()
    loss: Any = objective(**collate(packed, 0))
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)  # the loss is summed in float32
    for ours, theirs in zip(trained(model), trained(peft), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6 * float(theirs.grad.abs().max()))

    scored = [objective.eval()(**collate(batch, 0), score=True) for batch in (packed, rows)]
    assert all(isinstance(scores, TokenScores) for scores in scored)
    torch.testing.assert_close(scored[0].loss, scored[1].loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scored[0].loss.sum().double(), expected.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_saved_folder_is_one_of_peft(name: str, tmp_path: Path) -> None:
    """PEFT loads it, and gives the same logits; so do evaluation, generation, and a run that goes on from it."""
    model = inject(llama(), section(name), seed=0, steps=10)
    items = trainables(model, section(name), 1.0)
    moved = {f"master/{item.name}": item.parameter + 0.1 for item in items}
    drawn = torch.random.get_rng_state()
    save_adapter(model, moved, tmp_path, "-")
    assert torch.equal(torch.random.get_rng_state(), drawn), "saving draws nothing"

    base = llama()
    base.activation_checkpointing_enable({"use_reentrant": False})
    ours = _with_adapter(base, tmp_path, torch.device("cpu"))
    theirs = PeftModel.from_pretrained(llama("eager"), str(tmp_path)).eval()

    def logits(ids: Tensor) -> Tensor:
        return theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]

    torch.testing.assert_close(ours(input_ids=IDS).logits, logits(IDS), rtol=1e-6, atol=1e-6)
    greedy = IDS
    for _ in range(6):
        greedy = torch.cat([greedy, logits(greedy)[:, -1:].argmax(-1)], dim=1)
    padded = torch.cat([torch.tensor([[0], [3]]), IDS], dim=1)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    for cached in (True, False):
        config = GenerationConfig(max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0)
        assert torch.equal(ours.generate(input_ids=IDS, generation_config=config), greedy)
        found = ours.generate(input_ids=padded, attention_mask=mask, generation_config=config)
        assert torch.equal(found[0, 1:], greedy[0]), "padding on the left changes nothing"

    further = inject(llama(), section(name), seed=3, steps=10)
    load_start(further, trainables(further, section(name), 1.0), tmp_path)
    torch.testing.assert_close(further.eval()(input_ids=IDS).logits, logits(IDS), rtol=1e-6, atol=1e-6)
    with further.disable_adapter():
        torch.testing.assert_close(further(input_ids=IDS).logits, llama()(input_ids=IDS).logits)
    with torch.device("meta"):
        empty = inject(llama(), section(name), seed=0, steps=10)
    check_weights(empty, trainables(empty, section(name), 1.0), tmp_path)
    counts = trained_counts(empty)
    assert counts.by_kind == {"prompt_encoder": sum(item.parameter.numel() for item in items)}
    assert counts.by_layer.keys() == {"other"}


def test_the_names_of_papers() -> None:
    """Prefix tuning has the MLP of its paper, P-tuning v2 learns P keys and values of every layer themselves."""
    prefix = inject(llama(), AdapterSection(method="prefix_tuning"), seed=0, steps=1)
    assert {tuple(p.shape) for p in trained(prefix)} >= {(10, 16), (512, 16), (2 * 2 * 16, 512)}
    (own,) = trained(inject(llama(), AdapterSection(method="p_tuning_v2"), seed=0, steps=1))
    assert own.shape == (20, 2 * 2 * 16)


@pytest.mark.parametrize("name", PROMPT_METHODS)
def test_a_head_reads_behind_the_prompt(name: str, tmp_path: Path) -> None:
    """PEFT's own forward pass reads the last place, padding or not: the samples are given to it one by one."""
    make = partial(llama, "sdpa", LlamaForSequenceClassification, num_labels=3)
    base = make()
    base.activation_checkpointing_enable({"use_reentrant": False})
    model = inject(base, section(name), seed=0, steps=10)
    ids = torch.tensor([[5, 6, 7, 8, 0, 0], [9, 10, 11, 12, 13, 14]])
    model.train()(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in trained(model))
    items = trainables(model, section(name), 1.0)
    save_adapter(model, {f"master/{item.name}": item.parameter.detach() for item in items}, tmp_path, "-")
    assert "base_model.score.weight" in load_file(tmp_path / "adapter_model.safetensors")
    theirs = PeftModel.from_pretrained(make(), str(tmp_path)).eval()
    with torch.no_grad():
        expected = torch.cat([theirs(input_ids=ids[:1, :4]).logits, theirs(input_ids=ids[1:]).logits])
        found = _with_adapter(make(), tmp_path, torch.device("cpu"))(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_prefix_for_other_heads_is_refused_without_weights() -> None:
    """Falcon's queries share one key-value head, which its configuration does not say as PEFT reads it."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": WORDS}
    with torch.device("meta"):
        falcon = FalconForCausalLM(FalconConfig(**sizes)).requires_grad_(False)
    model = inject(falcon, section("p_tuning_v2"), seed=0, steps=1)
    with pytest.raises(
        UserError, match="has 1 key-value heads of size 8, and PEFT makes a prefix for 4 of size 8: set"
    ):
        check_prefix(model)
    with torch.device("meta"):
        check_prefix(inject(llama(), section("p_tuning_v2"), seed=0, steps=1))


def test_a_head_of_an_encoder_is_refused() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertForSequenceClassification(BertConfig(vocab_size=WORDS, **sizes))
    bert.config.architectures = ["BertForSequenceClassification"]
    with pytest.raises(UserError, match="from which the head of an encoder"):
        inject(bert, section("prompt_tuning"), seed=0, steps=1)


def test_it_learns() -> None:
    """Fifty steps teach a frozen random model to answer with one token: the loss falls by a third and more."""
    always = [Row(np.full(8, 3, dtype=np.int32), np.arange(8) > 3, [0])]
    for name in PROMPT_METHODS:
        model = inject(llama(initializer_range=0.2), section(name), seed=0, steps=50)
        objective = CausalLMObjective(without_adapter(model), partial(packed_arguments, SEGMENTS)).train()
        optimizer = torch.optim.AdamW(trained(model), lr=0.03)
        batch, losses = collate(always, 0), []
        for _ in range(50):
            loss: Any = objective(**batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.67 * losses[0], (name, losses[0], losses[-1])
