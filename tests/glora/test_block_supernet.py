"""A in mode block among the choices of a supernet and of a search: it has to be named, and is like every mode then."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from glora_llm.errors import UserError
from glora_llm.glora import GLoRAConfig, GLoRALinear
from glora_llm.glora.layer import GLoRALinear as Layer
from glora_llm.glora.linear import Slots, effective
from glora_llm.glora.modes import slot_values
from glora_llm.glora.path import LayerPath, SlotSpec, genome_to_json
from glora_llm.glora.path_sampler import draw_path
from glora_llm.glora.slopes import slopes
from glora_llm.glora.supernet import inherit, slot_choices
from glora_llm.plan.genome import extract
from glora_llm.search.cost import cost_key, measure
from glora_llm.search.space import LayerShape, Space
from tests.glora.conftest import Fill, Llama, glora, logits
from tests.glora.test_supernet import require_the_plain_layer

MODES = {"A": ["lora", "block", "vector", "none"], "B": ["lora", "none"], "C": ["vector"], "E": ["vector", "none"]}
SETTINGS: dict[str, Any] = {"supernet": {"modes": MODES, "ranks": [2, 1]}, "alpha": 3.0}
CHOICES = slot_choices(MODES, [2, 1], 3.0)
SIZES = {"hidden_size": 128, "intermediate_size": 192}


def net(fill: Fill) -> GLoRALinear:
    torch.manual_seed(0)
    layer = GLoRALinear(nn.Linear(128, 5).requires_grad_(False))
    layer.update_layer("default", GLoRAConfig(**SETTINGS), LayerPath(()))
    layer.set_adapter("default")
    fill(layer, std=0.3)
    return layer


def test_block_has_to_be_named() -> None:
    assert [spec.mode for spec in slot_choices(None, [2], 2.0)["A"]] == ["lora", "vector", "scalar", "none"]
    ranked = [SlotSpec(mode, rank, 1.5) for mode in ("lora", "block") for rank in (2, 1)]
    assert CHOICES["A"] == (*ranked, SlotSpec("vector"), SlotSpec("none"))


def test_every_draw_is_the_plain_layer_bit_for_bit(fill: Fill) -> None:
    layer, drawn = net(fill), [draw_path(CHOICES, True, number) for number in range(60)]
    assert {path["A"] for path in drawn} == set(CHOICES["A"])
    for path in drawn:
        require_the_plain_layer(layer, path)


def test_slopes_are_the_derivatives_of_the_formula(fill: Fill) -> None:
    layer: Any = net(fill).double()
    layer.path["default"] = LayerPath(())
    x = torch.randn(4, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = slopes({"layer": layer}, lambda: layer(x).pow(3).sum())
    weight, bias = layer.get_base_layer().weight.clone(), layer.b0.clone()
    weight.requires_grad_(), bias.requires_grad_()
    slope_w, slope_b = torch.autograd.grad(nn.functional.linear(x, weight, bias).pow(3).sum(), (weight, bias))
    expected = []
    for spec in CHOICES["A"]:
        own = {} if spec.mode == "none" else slot_values("A", spec, layer.slot_A["default"], Tensor.detach)
        changed, shifted = effective(weight.detach(), bias.detach(), Slots(**own), "product")
        assert shifted is not None
        expected.append(
            -float((slope_w * (changed - weight.detach())).sum() + (slope_b * (shifted - bias.detach())).sum())
        )
    torch.testing.assert_close(found[: len(expected)], torch.tensor(expected, dtype=torch.float64))
    assert all(expected[:-1])


def test_a_genome_with_blocks_inherits_saves_and_computes_the_same(llama: Llama, fill: Fill, tmp_path: Path) -> None:
    model = glora(llama(**SIZES), **SETTINGS)
    fill(model)
    model.save_pretrained(str(tmp_path / "supernet"))
    layers: dict[str, Any] = {name: m for name, m in model.base_model.model.named_modules() if isinstance(m, Layer)}
    genome = {name: draw_path(CHOICES, False, 4, name) for name in layers}
    assert {path["A"].mode for path in genome.values()} == set(MODES["A"])
    for name, layer in layers.items():
        layer.path["default"] = genome[name]
    expected = logits(model)
    (tmp_path / "genome.json").write_text(genome_to_json(genome))
    extract(tmp_path / "supernet", tmp_path / "genome.json", tmp_path / "plain")
    from peft import PeftModel

    again = PeftModel.from_pretrained(llama(**SIZES), str(tmp_path / "plain")).eval()
    assert torch.equal(logits(again), expected)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    first = next(name for name, path in genome.items() if path["A"] == SlotSpec("block", 1, 1.5))
    weights = inherit(load_file(tmp_path / "supernet" / "adapter_model.safetensors"), genome)
    assert weights[f"base_model.model.{first}.slot_A.block_down"].shape[1] == 1


def test_a_space_counts_and_measures_it() -> None:
    layer = LayerShape("layers.0.up_proj", 8, 128, False)
    space = Space([layer], CHOICES, "product")
    sizes = dict(zip(CHOICES["A"], space.parameters[0], strict=True))
    assert sizes[SlotSpec("block", 2, 1.5)] == 2 * (8 + 2) and sizes[SlotSpec("lora", 2, 1.5)] == 2 * (128 + 128)
    costs = measure(space, 16, torch.float32, torch.device("cpu"), rounds=1)
    assert costs[cost_key(layer, "A", SlotSpec("block", 2, 1.5))]["megabytes"] >= 16 * 20 / 1e6
    genome = {layer.name: LayerPath((("A", SlotSpec("block", 1, 1.5)), ("C", SlotSpec("vector"))))}
    assert space.genome(space.code(genome)) == genome
    with pytest.raises(UserError, match="cannot be block of rank 8; this supernet has: lora of rank 2, "):
        space.code({layer.name: LayerPath((("A", SlotSpec("block", 8, 1.5)), ("C", SlotSpec("vector"))))})


def test_a_layer_that_cannot_have_it_is_named(llama: Llama) -> None:
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.down_proj: Slot A in mode block has .* this one has 96"):
        glora(llama(hidden_size=128, intermediate_size=96), slots={"A": "block", "E": "vector"})
