"""A classifier takes classes and size from the data, and one that is there gets a new head where they differ."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from glora_llm.errors import UserError
from glora_llm.models.classifier import check_patches, from_data, with_head
from glora_llm.models.families import layers
from glora_llm.models.fingerprint import fingerprint
from glora_llm.models.folder import write_trained
from glora_llm.models.load import load_base
from glora_llm.models.resolve import ResolvedModel
from glora_llm.schema import ModelSection
from glora_llm.vlora import VLoRAConfig, make_compounds

NAMES = ["cat", "dog", "owl"]
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def vit(names: list[str]) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4}
    shape = {"image_size": 8, "patch_size": 4, "initializer_range": 0.3}
    return ViTForImageClassification(ViTConfig(**sizes, **shape, id2label=dict(enumerate(names)))).eval()


def saved(folder: Path, names: list[str]) -> ResolvedModel:
    """A folder as transformers writes a new model: tensors under the names of its older releases."""
    vit(names).save_pretrained(folder)
    return ResolvedModel(folder, "a vit", None, fingerprint(folder))


def shared(folder: Path) -> ResolvedModel:
    model = vit(NAMES)
    config = VLoRAConfig(layers_per_compound=2, rank=2)
    make_compounds(model, list(layers(model)), config)
    write_trained(folder, model.config, config, dict(model.named_parameters()))
    return ResolvedModel(folder, "a vit", None, fingerprint(folder))


def load(base: ResolvedModel) -> Any:
    return load_base(ModelSection(name_or_path="x"), base.folder, torch.device("cpu"))


def stored_names(base: ResolvedModel) -> set[str]:
    with safe_open(base.folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def test_the_data_say_classes_and_size() -> None:
    given = from_data({"model_type": "vit", "num_labels": 3}, NAMES, 32)
    assert given == {
        "image_size": 32, "num_channels": 3, "id2label": {0: "cat", 1: "dog", 2: "owl"},
        "label2id": {"cat": 0, "dog": 1, "owl": 2},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_labels": 10}, "model.config.num_labels is 10, and the data have 3 classes: leave the key out"),
        ({"image_size": 224}, "model.config.image_size is 224, and the data have images of 32 x 32 pixels"),
        ({"num_channels": 1}, "model.config.num_channels is 1, and the data have 3 channels"),
    ],
)
def test_a_configuration_that_contradicts_the_data(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        from_data(config, NAMES, 32)


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        (5, "does not divide images of 32 x 32 pixels: use one of 1, 2, 4, 8, 16, 32"),
        (0, "does not divide images of 32 x 32 pixels"),
        (None, "patch_size is None; expected one number"),
    ],
)
def test_patches_divide_the_images(patch: Any, said: str) -> None:
    check_patches(4, 32)
    with pytest.raises(UserError, match=said):
        check_patches(patch, 32)


def test_a_model_of_the_same_classes_computes_the_same_and_has_the_names_of_its_modules(tmp_path: Path) -> None:
    base = saved(tmp_path / "vit", NAMES)
    fitted = with_head(base, NAMES, 8, seed=0)
    assert stored_names(fitted) == set(vit(NAMES).state_dict()) != stored_names(base)
    assert torch.equal(load(fitted)(IMAGES).logits, vit(NAMES)(IMAGES).logits)
    assert with_head(fitted, NAMES, 8, seed=0) == fitted
    plain = AutoModelForImageClassification.from_pretrained(fitted.folder)
    assert torch.equal(plain(IMAGES).logits, vit(NAMES)(IMAGES).logits)


@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_other_classes_get_a_new_seeded_head(kind: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "vit", NAMES) if kind == "dense" else shared(tmp_path / "vit")
    names = ["red", "green", "blue", "black"]
    fitted = with_head(base, names, 8, seed=0)
    model, before = load(fitted), load(with_head(base, NAMES, 8, seed=0))
    assert model.config.id2label == dict(enumerate(names)) and model.classifier.weight.shape == (4, 16)
    assert torch.equal(model.vit(IMAGES).last_hidden_state, before.vit(IMAGES).last_hidden_state)
    assert model.classifier.weight.std() > 0 and model.classifier.bias.abs().max() == 0
    assert (fitted.folder / "vlora.json").is_file() == (kind == "shared")
    again, other = (with_head(base, names, 8, seed=seed) for seed in (0, 1))
    assert again == fitted and other.fingerprint != fitted.fingerprint != base.fingerprint
    assert not torch.equal(load(other).classifier.weight, model.classifier.weight)


def test_a_dry_run_needs_no_weights(tmp_path: Path) -> None:
    base = saved(tmp_path / "vit", NAMES)
    (base.folder / "model.safetensors").unlink()
    fitted = with_head(ResolvedModel(base.folder, base.name, None, ""), ["a", "b"], 8, seed=0, weights=False)
    assert {file.name for file in fitted.folder.iterdir()} == {"config.json"} and fitted.fingerprint == ""


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="takes images of 8 x 8 pixels, and these have 32 x 32: set data"):
        with_head(saved(tmp_path / "vit", NAMES), NAMES, 32, seed=0)
