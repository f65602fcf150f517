"""SSF and RepAdapter learn; on linears without bias: what stops a merge, and the argument that the message names."""

from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from glora_llm.adapters.inject import added_biases, inject
from glora_llm.errors import UserError
from glora_llm.merge.fitting import _require_served
from glora_llm.plan.mergeable import merge_obstacle
from glora_llm.schema import AdapterSection
from tests.adapters.module_models import SIZES, batch, tiny_model

KINDS = {
    "ssf": "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
    "repadapter": "gate_proj, k_proj, q_proj, up_proj, v_proj",
}


def adapted(base: Any, method: str, given: dict[str, Any] | None = None) -> Any:
    return inject(base, AdapterSection(method=method, peft=given), seed=0, steps=1)


@pytest.mark.parametrize("method", KINDS)
def test_a_family_without_biases(method: str) -> None:
    """A Mistral has none; with the argument of the message there is no obstacle, and no bias is added."""
    base = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2))
    obstacle = merge_obstacle(base.config, adapted(base, method))
    assert obstacle is not None
    assert f"gives a bias to {KINDS[method]}, and a mistral model of plain transformers has none there" in obstacle
    advice = yaml.safe_load(obstacle.partition("adapter.peft=")[2].rstrip("."))
    fresh = MistralForCausalLM(base.config)
    model = adapted(fresh, method, advice)
    assert merge_obstacle(base.config, model) is None and added_biases(model) == {}


@pytest.mark.parametrize("method", KINDS)
def test_a_server_that_would_drop_them(method: str) -> None:
    """Plain transformers and vLLM give a LLaMA all biases, SGLang only those of its attention."""
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    model = adapted(base, method)
    assert merge_obstacle(base.config, model) is None
    _require_served("vllm", base.config, model)
    with pytest.raises(UserError, match=r"a bias to (down_proj, )?gate_proj, up_proj, which sglang drops"):
        _require_served("sglang", base.config, model)


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_it_learns(family: str, method: str) -> None:
    """Thirty steps on one batch take more than half a nat of the loss away, and leave the base as it was."""
    base = tiny_model(family, torch.float32)
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    model = adapted(base, method).train()
    given = batch(family, torch.float32)
    labels = given["input_ids"] if family == "llama" else torch.tensor([0, 1])
    trained = [p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in name]
    optimizer, losses = torch.optim.AdamW(trained, lr=0.02), list[float]()
    for _ in range(30):
        loss = model(**given, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    kept = {name.replace(".base_layer", ""): value for name, value in model.get_base_model().state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in frozen.items() if name in kept)
    assert len(kept.keys() & frozen.keys()) > 10
