import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glora_llm.errors import UserError
from glora_llm.models.resolve import ResolvedModel, resolve
from glora_llm.schema import ModelSection


def edited(folder: Path, **keys: object) -> ModelSection:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return ModelSection(name_or_path=str(folder))


def test_embedded_twice(tiny: ResolvedModel) -> None:
    assert tiny.name == "embedded:tiny-llama" and tiny.revision is None
    assert resolve(ModelSection(name_or_path=tiny.name)) == tiny


def test_folder(tiny: ResolvedModel, tiny_copy: Path) -> None:
    found = resolve(ModelSection(name_or_path=str(tiny_copy)))
    assert (found.folder, found.fingerprint) == (tiny_copy.resolve(), tiny.fingerprint)


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "a/b/c", "missing/model.gguf", "two words"])
def test_missing(name: str) -> None:
    with pytest.raises(UserError, match="does not exist"):
        resolve(ModelSection(name_or_path=name))


def test_hub_offline() -> None:
    with pytest.raises(UserError, match=r"hub cannot be reached.*hf download meta-llama/Llama-2-7b-hf"):
        resolve(ModelSection(name_or_path="meta-llama/Llama-2-7b-hf"))


def test_hub_takes_safetensors_and_records_the_commit(
    tiny: ResolvedModel, tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tiny_copy.rename(tiny_copy.with_name(commit))
    asked: dict[str, Any] = {}

    def download(name: str, **keys: Any) -> str:
        asked.update(keys, name=name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = resolve(ModelSection(name_or_path="owner/model", revision="main"))
    assert (found.folder, found.revision, found.fingerprint) == (folder, commit, tiny.fingerprint)
    assert (asked["name"], asked["revision"]) == ("owner/model", "main")
    assert "*.safetensors" in asked["allow_patterns"] and not any("bin" in part for part in asked["allow_patterns"])


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("GatedRepoError", "gated"),
        ("RepositoryNotFoundError", "neither a folder here nor a model on the hub"),
        ("RevisionNotFoundError", "no revision 'v2'"),
    ],
)
def test_hub_refuses(failure: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    kind = getattr(errors, failure)

    def download(name: str, **keys: Any) -> str:
        raise kind.__new__(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError, match=message):
        resolve(ModelSection(name_or_path="owner/model", revision="v2"))


def test_revision_of_a_local_model(tiny_copy: Path) -> None:
    with pytest.raises(UserError, match="revision 'main' belongs to hub ids"):
        resolve(ModelSection(name_or_path=str(tiny_copy), revision="main"))


def no_config(folder: Path) -> ModelSection:
    (folder / "config.json").unlink()
    return ModelSection(name_or_path=str(folder))


def adapter(folder: Path) -> ModelSection:
    (folder / "adapter_config.json").touch()
    return no_config(folder)


def broken_config(folder: Path) -> ModelSection:
    (folder / "config.json").write_text("{")
    return ModelSection(name_or_path=str(folder))


def pickles(folder: Path) -> ModelSection:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return ModelSection(name_or_path=str(folder))


def no_weights(folder: Path) -> ModelSection:
    (folder / "model.safetensors").unlink()
    return ModelSection(name_or_path=str(folder))


def weights_file(folder: Path) -> ModelSection:
    return ModelSection(name_or_path=str(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (no_config, "has no config.json"),
        (adapter, "give the base model that the adapter was trained on"),
        (broken_config, "is not valid JSON"),
        (pickles, r"pytorch_model.bin but no safetensors.*save_pretrained"),
        (no_weights, "holds no weights"),
        (weights_file, "is a file but no .gguf"),
        (
            lambda folder: edited(folder, architectures=["LlamaForSequenceClassification"]),
            "one of the causal language mo",
        ),
        (lambda folder: edited(folder, model_type="vit"), "model_type 'vit', which is no causal language model"),
        (lambda folder: edited(folder, quantization_config={"quant_method": "gptq"}), r"already quantised \(gptq\)"),
    ],
)
def test_refused_folders(prepare: Callable[[Path], ModelSection], message: str, tiny_copy: Path) -> None:
    section = prepare(tiny_copy)
    with pytest.raises(UserError, match=message):
        resolve(section)


@pytest.mark.parametrize(("content", "message"), [(b"GGML", "is no GGUF file"), (b"GGUF" + bytes(64), "Cannot read")])
def test_broken_gguf(content: bytes, message: str, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=message):
        resolve(ModelSection(name_or_path=str(tmp_path / "x.gguf")))
    assert not list(cache.glob("gguf*-x-*"))
