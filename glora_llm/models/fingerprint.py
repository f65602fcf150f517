"""The fingerprint of a base model, 64 hex digits of its configuration and the beginning of every tensor."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, BinaryIO

from glora_llm.errors import UserError
from glora_llm.files.json_file import read_object
from glora_llm.models.config_file import AGAIN

HEAD_BYTES = 4096
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# what says nothing about the function that the model computes; everything else in config.json counts
NOT_ARCHITECTURE = {
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "initializer_range",
}


def fingerprint(folder: Path) -> str:
    """Return sha256 over the architecture keys of config.json and, by tensor, name, dtype, shape and first 4 KiB.

    It does not depend on how the tensors are spread over files, and reads a few MB even of a 70B model.

    Raises:
        UserError: when the folder holds no complete safetensors model.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(_canonical({k: v for k, v in config.items() if k not in NOT_ARCHITECTURE}))
    where = {name: file for file in weight_files(folder) for name in read_header(file)[0]}
    by_file: dict[Path, dict[str, bytes]] = {file: _tensor_digests(file) for file in set(where.values())}
    for name in sorted(where):
        digest.update(by_file[where[name]][name])
    if (folder / "vlora.json").is_file():  # what the stored bases and increments are composed by
        digest.update(_canonical(json.loads((folder / "vlora.json").read_text(encoding="utf-8"))))
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers would load: model.safetensors, else those of the index.

    Raises:
        UserError: when there are none, or one that the index names is missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(_no_weights(folder))
    places = read_object(index, AGAIN).get("weight_map")
    if not isinstance(places, dict) or not places or not all(map(_is_beside, places.values())):
        raise UserError(f"{index}: its weight_map does not say which file beside it holds each tensor. {AGAIN}")
    names = sorted(set(places.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is incomplete: its index names {len(names)} weight files, {len(missing)} are missing "
            f"({', '.join(missing[:3])}). {AGAIN}"
        )
    return [folder / name for name in names]


def _is_beside(name: Any) -> bool:
    """Tell whether this is the name of a safetensors file in the same folder."""
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def stored_bytes(folder: Path) -> int:
    """Return the bytes of the files that `weight_files` returns.

    Raises:
        UserError: as `weight_files`.
    """
    return sum(file.stat().st_size for file in weight_files(folder))


def _no_weights(folder: Path) -> str:
    """Return why there is nothing to load: pickles only, or nothing at all."""
    pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    if pickles:
        return (
            f"{folder} holds {pickles[0]} but no safetensors, and pickles are not read. Convert it once: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors; "
            "copy the tokenizer files beside them."
        )
    return f"{folder} holds no weights: expected model.safetensors or model.safetensors.index.json"


def _tensor_digests(file: Path) -> dict[str, bytes]:
    """Return tensor name -> digest of its name, dtype, shape and first bytes."""
    header, start = read_header(file)
    digests = {}
    with file.open("rb") as stream:
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            stream.seek(start + begin)
            head = stream.read(min(HEAD_BYTES, end - begin))
            digests[name] = hashlib.sha256(_canonical([name, entry["dtype"], entry["shape"]]) + head).digest()
    return digests


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Return the table of a safetensors file (8 bytes of length, then JSON) and where its data begins.

    Raises:
        UserError: when the file is cut off or is no safetensors file.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        size = stream.seek(0, 2)
        table = _table(stream, length) if 2 <= length <= size - 8 else None
    if table is None or 8 + length + max((t["data_offsets"][1] for t in table.values()), default=0) != size:
        raise UserError(f"{file} ({size} bytes) is damaged or cut off. {AGAIN}")
    return table, 8 + length


def _table(stream: BinaryIO, length: int) -> dict[str, Any] | None:
    """Return the JSON table without its metadata, or None when it is no table of tensors."""
    stream.seek(8)
    try:
        table = json.loads(stream.read(length))
    except (ValueError, RecursionError):
        return None
    if not isinstance(table, dict):
        return None
    table.pop("__metadata__", None)
    return table if all(map(_is_entry, table.values())) and _is_gapless(table) else None


def _is_entry(entry: Any) -> bool:
    """Tell whether this is a tensor of a table: its dtype, its shape, and offsets that hold as many bytes."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return False
    bits, shape, offsets = DTYPE_BITS.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    if bits is None or not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        return False
    return bool(math.prod(shape) * bits == 8 * (offsets[1] - offsets[0]))


def _is_gapless(table: dict[str, Any]) -> bool:
    """Tell whether each tensor begins where another ends, the first at 0: the format has no holes."""
    at = 0
    for begin, end in sorted(entry["data_offsets"] for entry in table.values()):
        if begin != at:
            return False
        at = end
    return True


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _canonical(value: Any) -> bytes:
    """Return JSON with sorted keys and no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
