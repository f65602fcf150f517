"""GLoRA on the stacked experts of a Mixtral: each is the formula, trains, is saved and merged; the rest is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from glora_llm.errors import AdapterError
from glora_llm.glora import GLoRAConfig
from glora_llm.glora.experts import GLoRAExperts
from tests.glora.conftest import Fill, logits

MODES = [
    {"A": "lora", "B": "lora"}, {"A": "vector", "B": "scalar"}, {"A": "scalar", "B": "vector"}, {"B": "lora"},
]  # fmt: skip


def mixtral() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return MixtralForCausalLM(
        MixtralConfig(**sizes, vocab_size=32, num_key_value_heads=1, num_local_experts=3, initializer_range=0.2)
    ).eval()


def adapted(base: Any, **keys: Any) -> Any:
    defaults: dict[str, Any] = {"target_modules": ["experts"], "rank": 2, "alpha": 3.0}
    return get_peft_model(base, GLoRAConfig(**defaults | keys)).eval()


@pytest.mark.parametrize("composition", ["product", "hadamard"])
@pytest.mark.parametrize("slots", MODES, ids=str)
def test_each_expert_is_the_formula(slots: dict[str, str], composition: str, fill: Fill) -> None:
    model = adapted(mixtral().double(), slots=slots, composition=composition)
    fill(model, std=0.3)
    layer = model.get_base_model().model.layers[0].mlp.experts
    assert isinstance(layer, GLoRAExperts)
    original = {name: value.clone() for name, value in layer.get_base_layer().named_parameters()}
    layer.merge(safe_merge=True)
    for stack, w0 in original.items():
        for expert, matrix in enumerate(w0):
            wanted = matrix.clone()
            for slot, mode in slots.items():
                stored = dict(getattr(layer, f"slot_{slot}")["default"][stack].named_parameters())
                if mode == "lora":
                    product = 1.5 * stored["down"][expert] @ stored["up"][expert]
                    thin = matrix @ product if slot == "A" and composition == "product" else product
                    wanted += matrix * product if slot == "A" and composition == "hadamard" else thin
                else:
                    value = stored[mode][expert][:, None]
                    wanted += value * matrix if slot == "A" else value
            found = getattr(layer.get_base_layer(), stack)[expert]
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    layer.unmerge()
    assert all(torch.equal(value, original[name]) for name, value in layer.get_base_layer().named_parameters())


def test_it_trains_saves_and_merges(tmp_path: Path) -> None:
    base = mixtral()
    plain = logits(base)
    model = adapted(base, slots={"A": "lora", "B": "lora"})
    assert torch.equal(logits(model), plain), "it begins as the base"
    ids = torch.randint(0, 32, (4, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.3
    trained = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(mixtral(), tmp_path / "adapter").eval()), trained)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"slots": {"A": "lora", "C": "vector"}}, "Slot C is, or scales, a bias"),
        ({"slots": {"E": "scalar"}}, "They have A and B"),
        ({"slots": {"A": "block"}}, "mode block is of a single matrix"),
        ({"slots": {"B": "lora"}, "dropout": 0.1}, "dropout is of the input of A and B"),
        ({"supernet": {}}, "A supernet is of linears and convolutions"),
    ],
)
def test_what_has_no_meaning(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        adapted(mixtral(), **keys)
