"""A supernet as PEFT saves it, and a genome's plain adapter with the weights that it inherits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from glora_llm.adapters.inject import adapted_layers
from glora_llm.errors import UserError
from glora_llm.glora.path import Genome, LayerPath, SlotSpec, genome_to_json
from glora_llm.glora.path_sampler import Supernet, draw_path
from glora_llm.glora.supernet import inherit, set_paths, slot_choices
from glora_llm.plan.genome import extract
from glora_llm.schema.slots import SLOTS
from tests.glora.conftest import Fill, Llama, glora, logits, slot_values

MODES = {"A": ["lora", "vector", "none"], "B": ["lora", "scalar"]}
SETTINGS: dict[str, Any] = {"supernet": {"modes": MODES, "ranks": [4, 2]}, "alpha": 3.0}
CHOICES = slot_choices(MODES, [4, 2], 3.0)
UP = "model.layers.1.mlp.up_proj"


def loaded(base: Any, folder: Path) -> Any:
    return PeftModel.from_pretrained(base, str(folder)).eval()


def random_genome(model: Any, seed: int) -> Genome:
    return {name: draw_path(CHOICES, layer.b0 is not None, seed, name) for name, layer in adapted_layers(model).items()}


@pytest.mark.parametrize("composition", ["product", "hadamard"])
def test_a_supernet_survives_its_folder(composition: str, llama: Llama, fill: Fill, tmp_path: Path) -> None:
    model = glora(llama(attention_bias=True), composition=composition, **SETTINGS)
    fill(model)
    largest = logits(model)
    model.save_pretrained(str(tmp_path))
    again = loaded(llama(attention_bias=True), tmp_path)
    values = slot_values(again)
    assert values.keys() == slot_values(model).keys()
    assert all(torch.equal(values[name], value) for name, value in slot_values(model).items())
    assert torch.equal(logits(again), largest) and not torch.allclose(largest, logits(llama(attention_bias=True)))
    assert again.peft_config["default"].supernet == SETTINGS["supernet"]
    for net in (model, again):
        Supernet(adapted_layers(net), seed=5).draw(3, 0)
    assert torch.equal(logits(again), logits(model)) and not torch.allclose(logits(model), largest)


@pytest.mark.parametrize("composition", ["product", "hadamard"])
def test_a_genome_s_plain_adapter_is_its_path_bit_for_bit(
    composition: str, llama: Llama, fill: Fill, tmp_path: Path
) -> None:
    model = glora(llama(attention_bias=True), composition=composition, **SETTINGS)
    fill(model)
    model.save_pretrained(str(tmp_path / "supernet"))
    outputs = []
    for seed in range(4):
        genome = random_genome(model, seed)
        if seed == 3:
            genome.pop(UP)  # a layer that a genome does not name has no slot
        (tmp_path / "genome.json").write_text(genome_to_json(genome))
        extract(tmp_path / "supernet", tmp_path / "genome.json", tmp_path / "plain")
        plain = loaded(llama(attention_bias=True), tmp_path / "plain")
        set_paths(adapted_layers(model), {UP: LayerPath(()), **genome})
        outputs.append(logits(plain))
        assert torch.equal(outputs[-1], logits(model))
        active = {(n, slot) for n, path in genome.items() for slot, _ in path.active()}
        layers = adapted_layers(plain).items()
        assert {(n, slot) for n, layer in layers for slot in SLOTS if len(getattr(layer, f"slot_{slot}"))} == active
        assert plain.peft_config["default"].supernet is None
    assert not any(torch.allclose(outputs[0], other, atol=1e-3) for other in outputs[1:])


@pytest.mark.parametrize("composition", ["product", "hadamard"])
def test_a_genome_merges(composition: str, llama: Llama, fill: Fill, tmp_path: Path) -> None:
    model = glora(llama(attention_bias=True), composition=composition, **SETTINGS)
    fill(model)
    model.save_pretrained(str(tmp_path / "supernet"))
    genome = random_genome(model, 0)
    (tmp_path / "genome.json").write_text(genome_to_json(genome))
    extract(tmp_path / "supernet", tmp_path / "genome.json", tmp_path / "plain")
    plain = loaded(llama(attention_bias=True), tmp_path / "plain")
    expected = logits(plain)
    merged = plain.merge_and_unload()
    assert not slot_values(merged)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    set_paths(adapted_layers(model), genome)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_weights_of_other_modules_are_kept(llama: Llama, fill: Fill, tmp_path: Path) -> None:
    model = glora(llama(attention_bias=True), modules_to_save=["lm_head"], **SETTINGS)
    fill(model)
    model.save_pretrained(str(tmp_path))
    weights = load_file(tmp_path / "adapter_model.safetensors")
    head = [name for name in weights if "lm_head" in name]
    found = inherit(weights, {UP: LayerPath((("B", SlotSpec("scalar")),))})
    assert len(head) == 1 and sorted(found) == sorted([*head, f"base_model.model.{UP}.slot_B.scalar"])
    assert all(torch.equal(found[name], weights[name]) for name in found)


@pytest.fixture
def folder(llama: Llama, tmp_path: Path) -> Path:
    """A supernet's adapter folder; only the attention's linears have a bias."""
    glora(llama(attention_bias=True), **SETTINGS).save_pretrained(str(tmp_path / "supernet"))
    return tmp_path / "supernet"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"model.layers.1.mlp.up_prj": {}},
         r"there is no adapted layer 'model\.layers\.1\.mlp\.up_prj' among the 14 of this model, such as "
         r"model\.layers\.0\.\S+\. Did you mean 'model\.layers\.1\.mlp\.up_proj'\?"),
        ({UP: {"A": "scalar"}}, rf"slot A of {UP} is to be scalar, and the supernet has no such mode there"),
        ({UP: {"D": "vector"}}, rf"slot D of {UP} is to be vector, and the supernet has no such mode there"),
        ({UP: {"B": {"mode": "lora", "rank": 5, "scale": 0.75}}},
         rf"slot B of {UP} has rank 5; the supernet has up to 4\."),
    ],
)  # fmt: skip
def test_a_genome_that_the_supernet_lacks_is_named(layers: dict[str, Any], message: str, folder: Path) -> None:
    genome, out = folder.parent / "genome.json", folder.parent / "plain"
    genome.write_text(json.dumps(layers))
    with pytest.raises(UserError, match=message):
        extract(folder, genome, out)
    assert not out.exists()


def test_what_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"There is no genome file .*genome\.json; a search writes RUN/genome\.json"):
        extract(folder, folder / "genome.json", folder / "plain")
    with pytest.raises(UserError, match="holds no adapter: the run has not ended"):
        extract(folder.parent, folder / "genome.json", folder / "plain")
