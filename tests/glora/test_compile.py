"""torch.compile of every decoder layer: one graph a layer, the outputs and gradients of the layer as it is."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from glora_llm.adapters.inject import inject
from glora_llm.models.families import layers
from glora_llm.models.load import load_base
from glora_llm.models.resolve import ResolvedModel
from glora_llm.schema import AdapterSection, ModelSection
from tests.glora.conftest import IDS

SLOTS: Any = {"A": "lora", "B": "lora", "C": "vector", "E": "vector"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def outputs_and_gradients(
    section: ModelSection, adapter: AdapterSection, tiny: ResolvedModel, compiled: bool
) -> dict[str, Tensor]:
    base: Any = load_base(section, tiny.folder, torch.device("cpu"))
    model = inject(base, adapter, seed=0, steps=10).train()
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        if value.requires_grad:
            value.data += 0.02 * torch.randn(value.shape, generator=generator)
    for layer in layers(base) if compiled else ():
        layer.compile(backend="aot_eager", fullgraph=True)
    positions = (torch.arange(IDS.shape[1]) % 4).expand_as(IDS)  # two samples in a row, as packing makes them
    hidden = base.model(input_ids=IDS, position_ids=positions, use_cache=False).last_hidden_state
    hidden.square().mean().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    return {"": hidden.detach(), **gradients}


@pytest.mark.parametrize(
    ("quantization", "method", "checkpointing"),
    [
        ("none", "glora", False),
        ("nf4", "glora", True),
        ("int8", "glora", False),
        ("none", "hadamard", True),
        ("nf4", "block", False),
        ("nf4", "lora", False),
        ("none", "lora", True),
    ],
)
def test_compiled_layers_compute_and_learn_as_they_are(
    quantization: Any, method: str, checkpointing: bool, tiny: ResolvedModel
) -> None:
    section = ModelSection(name_or_path="x", quantization=quantization, gradient_checkpointing=checkpointing)
    adapter = AdapterSection(method="lora", rank=4)
    if method == "block":
        adapter = AdapterSection(rank=1, preset="lossless4")
    elif method != "lora":
        adapter = AdapterSection(rank=4, slots=SLOTS, composition="product" if method == "glora" else "hadamard")
    wanted = outputs_and_gradients(section, adapter, tiny, compiled=False)
    found = outputs_and_gradients(section, adapter, tiny, compiled=True)
    assert found.keys() == wanted.keys() and len(wanted) > 2 * 7
    for name, value in wanted.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=name)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]
