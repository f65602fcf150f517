import json
from collections.abc import Callable
from pathlib import Path

import pytest

from glora_llm.errors import UserError
from glora_llm.models.fingerprint import fingerprint, weight_files
from glora_llm.models.resolve import ResolvedModel


def data_begin(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def flip_a_byte(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[data_begin(file) + 10] ^= 1
    file.write_bytes(content)


def edit_config(folder: Path, **keys: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def rename_a_tensor(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"model.norm.weight"', b'"model.nort.weight"'))


def test_a_copy_is_the_same_model(tiny: ResolvedModel, tiny_copy: Path) -> None:
    assert len(tiny.fingerprint) == 64
    assert fingerprint(tiny.folder) == tiny.fingerprint == fingerprint(tiny_copy)


def test_notes_in_the_config_do_not_count(tiny: ResolvedModel, tiny_copy: Path) -> None:
    edit_config(tiny_copy, transformers_version="9.9", use_cache=False, dtype="bfloat16")
    assert fingerprint(tiny_copy) == tiny.fingerprint


@pytest.mark.parametrize(
    "change", [flip_a_byte, rename_a_tensor, lambda folder: edit_config(folder, rms_norm_eps=1e-5)]
)
def test_another_model_has_another(change: Callable[[Path], None], tiny: ResolvedModel, tiny_copy: Path) -> None:
    change(tiny_copy)
    assert fingerprint(tiny_copy) != tiny.fingerprint


@pytest.mark.parametrize("content", [b"", b"12345", b"\xff" * 64, None])
def test_damaged_weights(content: bytes | None, tiny_copy: Path) -> None:
    file = tiny_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UserError, match="damaged or cut off"):
        fingerprint(tiny_copy)


def test_missing_shard(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(UserError, match=r"1 are missing \(model-00002-of-00002.safetensors\)"):
        weight_files(tmp_path)
