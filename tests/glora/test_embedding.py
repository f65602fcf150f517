"""GLoRA on an embedding: f(t) = W0[t] + W0[t] A + B[t] + E, against the whole changed matrix, in float64."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout

from glora_llm.errors import AdapterError
from glora_llm.glora import GLoRAConfig
from glora_llm.glora.embedding import GLoRAEmbedding
from glora_llm.glora.path import LayerPath, make_path
from tests.glora.conftest import Fill
from tests.glora.formula import SCALE, changes, require_same, value
from tests.glora.paths import all_paths, block_paths

V, D = 9, 64
TOKENS = torch.tensor([[1, 5, 5, 8], [0, 2, 1, 3]])
PATHS = [path for path in all_paths(2, SCALE, has_bias=False) if path["C"].mode == "none"]


def glora_embedding(path: LayerPath, composition: str, rate: float = 0.0) -> Any:
    torch.manual_seed(1)
    layer = GLoRAEmbedding(nn.Embedding(V, D, dtype=torch.float64).requires_grad_(False))
    layer.update_layer("default", GLoRAConfig(composition=composition, dropout=rate), path)
    layer.set_adapter("default")
    return layer


@pytest.mark.parametrize("composition", ["product", "hadamard"])
def test_every_slot_and_mode_is_the_formula(composition: str, fill: Fill) -> None:
    assert len(PATHS) == 48
    blocks = [path for path in block_paths(1, SCALE, has_bias=False) if path["C"].mode == "none"]
    for path in PATHS + (blocks if composition == "product" else []):
        layer = glora_embedding(path, composition)
        assert torch.equal(layer(TOKENS), layer.get_base_layer()(TOKENS)), "it begins as the base"
        if list(path.active()):
            fill(layer, std=1.0)
        w0 = layer.get_base_layer().weight
        thin, thick = changes(layer, w0, composition)
        shift = value(layer, "E")
        matrix = w0 + thin + thick + (shift.reshape(1, -1) if isinstance(shift, torch.Tensor) else shift)
        inputs = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        if inputs:
            require_same(layer(TOKENS), matrix[TOKENS], inputs, path)
        with torch.no_grad():
            unmerged = layer(TOKENS)
            layer.merge(safe_merge=True)
            merged = layer.get_base_layer()
            assert type(merged) is nn.Embedding
            torch.testing.assert_close(merged(TOKENS), unmerged, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(merged.weight, matrix, rtol=1e-10, atol=1e-10)
            layer.unmerge()
            assert torch.equal(layer.get_base_layer().weight, w0)


def test_a_token_that_was_not_seen_keeps_what_b_gives_it(fill: Fill) -> None:
    layer = glora_embedding(make_path({"B": "lora"}, 2, 3.0), "product")
    before = layer.get_base_layer().weight.clone()
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        layer(TOKENS).square().sum().backward()
        optimizer.step()
    weight, bias = layer.merged_weight(["default"])
    seen = TOKENS.unique()
    unseen = [token for token in range(V) if token not in seen]
    assert bias is None and unseen and torch.equal(weight[unseen], before[unseen])
    assert (weight[seen] - before[seen]).abs().amax(1).min() > 0


def test_dropout_is_of_the_row() -> None:
    layer = glora_embedding(make_path({"A": "lora"}, 2, 3.0), "product", rate=0.5).train()
    nn.init.normal_(layer.slot_A["default"].down)
    torch.manual_seed(2)
    y = layer(TOKENS)
    rows = layer.get_base_layer()(TOKENS)
    torch.manual_seed(2)
    torch.testing.assert_close(y, rows + dropout(rows, 0.5) @ value(layer, "A"))


@pytest.mark.parametrize(
    ("slots", "said"),
    [({"C": "vector"}, "Slot C adds a constant to a layer's input"), ({"D": "vector"}, "Slot D scales")],
)
def test_slots_without_a_meaning(slots: dict[str, str], said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        glora_embedding(make_path(slots, 2, 3.0), "product")


def test_no_supernet() -> None:
    layer = GLoRAEmbedding(nn.Embedding(4, 4))
    with pytest.raises(AdapterError, match="A supernet is of linears and convolutions"):
        layer.update_layer("default", GLoRAConfig(supernet={}), LayerPath(()))
