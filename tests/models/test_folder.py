"""Folders of new models and of models whose layers share weights."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from glora_llm.errors import UserError
from glora_llm.models.fingerprint import fingerprint
from glora_llm.models.folder import WEIGHTS, new_config, new_folder, read_sharing, vlora_config, write_trained
from glora_llm.models.load import load_base, meta_model
from glora_llm.schema import ModelSection, VLoRASection
from glora_llm.vlora import allocated, vlora_layers

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 32,
    "tie_word_embeddings": True,
}  # fmt: skip


def section(**config: Any) -> ModelSection:
    return ModelSection(config={"model_type": "llama", **SIZES, **config}, dtype="float32")


def new(vlora: VLoRASection | None = None, seed: int = 0, **config: Any) -> tuple[Any, Path]:
    """A new model and its folder."""
    folder, _ = new_folder(new_config(section(**config), "text", {}), vlora, seed, "nothing", lambda _: None)
    return load_base(section(**config), folder, CPU), folder


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def test_a_seed_is_a_model() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, folder = new()
    again, same = new()
    other, elsewhere = new(seed=1)
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator is left alone"
    assert folder == same and folder != elsewhere
    assert {path.name for path in folder.iterdir()} == {"config.json", "start.json"}
    drawn = parameters(first)["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(drawn, parameters(again)["model.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(drawn, parameters(other)["model.layers.0.mlp.up_proj.weight"])
    assert not any(p.requires_grad for p in first.parameters())


def test_a_dense_model_and_a_vlora_one_begin_alike() -> None:
    dense, _ = new()
    shared, folder = new(VLoRASection(layers_per_compound=2, rank=2))
    assert len(vlora_layers(shared)) == 14 and (folder / "vlora.json").is_file()
    kept = {name: p for name, p in parameters(shared).items() if "increment_" not in name}
    assert kept
    for name, parameter in kept.items():
        assert torch.equal(parameter, parameters(dense)[name]), name
    assert all(not p.any() for name, p in parameters(shared).items() if name.endswith("increment_b"))
    kaiming, _ = new(VLoRASection(layers_per_compound=2, rank=2, start="kaiming"), seed=3)
    again, _ = new(VLoRASection(layers_per_compound=2, rank=2, start="kaiming"), seed=3)
    for name, parameter in parameters(kaiming).items():
        assert torch.equal(parameter, parameters(again)[name]), name
    assert all(p.any() for name, p in parameters(kaiming).items() if name.endswith("increment_b"))


def test_rounding_spares_what_is_not_trained() -> None:
    """bfloat16 parameters, but rotary frequencies as transformers computes them."""
    exact, folder = new()
    rounded = load_base(section().model_copy(update={"dtype": "bfloat16"}), folder, CPU)
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    assert torch.equal(rounded.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A VLoRA folder with weights."""
    sharing = VLoRASection(layers_per_compound=4, rank={"q_proj": 2, "up_proj": 3}, targets=["q_proj", "up_proj"])
    model, _ = new(sharing)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    write_trained(tmp_path / "model", model.config, vlora_config(sharing), weights)
    return tmp_path / "model"


def test_a_written_model_is_read_again(trained: Path) -> None:
    read = load_base(ModelSection(name_or_path="x", dtype="float32"), trained, CPU)
    stored = load_file(trained / WEIGHTS)
    assert parameters(read).keys() == stored.keys()
    for name, parameter in parameters(read).items():
        assert torch.equal(parameter, stored[name])
    assert read.lm_head.weight is read.model.embed_tokens.weight
    assert read_sharing(trained) == vlora_config(
        VLoRASection(layers_per_compound=4, rank={"q_proj": 2, "up_proj": 3}, targets=["q_proj", "up_proj"])
    )
    empty = meta_model(ModelSection(name_or_path="x"), trained)
    assert {name: p.shape for name, p in empty.named_parameters()} == {name: p.shape for name, p in stored.items()}
    assert allocated(empty).increments == 3 * (2 * (16 + 16) + 3 * (24 + 16))


def test_how_weights_are_shared_is_part_of_the_identity(trained: Path) -> None:
    before = fingerprint(trained)
    sharing = json.loads((trained / "vlora.json").read_text())
    (trained / "vlora.json").write_text(json.dumps(sharing | {"alpha": 3.0}))
    assert fingerprint(trained) != before


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda folder: (folder / WEIGHTS).unlink(),
            "holds vlora.json and no model.safetensors: it was",
        ),
        (lambda folder: rewrite(folder, drop="model.norm.weight"), "model.norm.weight is missing; expected (16,)"),
        (lambda folder: rewrite(folder, more="model.x"), "has model.x, which vlora.json does not ask for"),
        (lambda folder: (folder / "vlora.json").write_text("{"), "does not say how layers share weights"),
        (lambda folder: (folder / "vlora.json").write_text('{"size": 4}'), "does not say how layers share weights"),
    ],
)
def test_a_damaged_folder_is_refused(trained: Path, damage: Any, said: str) -> None:
    damage(trained)
    with pytest.raises(UserError, match=re.escape(said)):
        load_base(ModelSection(name_or_path="x", dtype="float32"), trained, CPU)


def rewrite(folder: Path, drop: str = "", more: str = "") -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(drop, None)
    save_file(tensors | ({more: torch.zeros(1)} if more else {}), folder / WEIGHTS)


def test_shared_weights_are_not_quantised(trained: Path) -> None:
    with pytest.raises(UserError, match="bases and increments must be dense"):
        load_base(ModelSection(name_or_path="x", quantization="nf4"), trained, CPU)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "lama"}, "model.config.model_type 'lama' is no family of models of the installed transformers"),
        ({"model_type": "vit"}, "model.config.model_type 'vit' is a family of image classifiers"),
        ({"hiden_size": 3}, "model.config.hiden_size: a llama has no such setting. Did you mean 'hidden_size'?"),
        ({"hidden_size": 18}, "is not a multiple of the number of attention heads"),
        ({"hidden_size": "18"}, "expected int, got str"),
    ],
)
def test_a_configuration_that_cannot_be(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        new_config(section(**config), "text", {})


def test_what_follows_from_the_data_yields_to_the_recipe() -> None:
    made = new_config(section(vocab_size=40), "text", {"vocab_size": 32, "bos_token_id": 7})
    assert (made.vocab_size, made.bos_token_id) == (40, 7)
    assert new_config(ModelSection(config={"model_type": "llama"}), "text", {"vocab_size": 32}).vocab_size == 32
    _, folder = new()
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == 4
