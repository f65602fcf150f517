"""The weights of model folders: safetensors files and their index."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_input.case import Case, Change, bad, both
from tests.bad_input.model_cases import HERE, WEIGHTS, model, remove, written


def header(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Return what changes the table of a model's safetensors file; the data stay."""

    def damage(folder: Path) -> None:
        file = folder / WEIGHTS
        content = file.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        table = json.loads(content[8 : 8 + length])
        text = json.dumps(change(table) or table).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return model(damage)


def sharded(index: Any) -> Change:
    """Return what renames the weights to a shard and writes an index."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
        text = index if isinstance(index, str) else json.dumps(index)
        (folder / "model.safetensors.index.json").write_text(text)

    return model(damage)


def zeros(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(bytes(file.stat().st_size))


def cut(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without(table: dict[str, Any], name: str) -> None:
    table.pop(next(key for key in table if name in key))


FILES: dict[str, Case] = {
    f"weights: {name}": bad(says, HERE, change=change)
    for name, (says, change) in {
        "not there": (
            "model holds no weights: expected model.safetensors or",
            model(lambda folder: (folder / WEIGHTS).unlink()),
        ),
        "a pickle alone": (
            "model holds pytorch_model.bin but no safetensors, and pickles are not",
            model(lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin")),
        ),
        "empty": ("model/model.safetensors (0 bytes) is damaged or cut off. Download or", written(WEIGHTS, b"")),
        "cut off": ("model/model.safetensors (215728 bytes) is damaged or cut off. Download", model(cut)),
        "all zero": ("model/model.safetensors (431456 bytes) is damaged or cut off. Download", model(zeros)),
        "text": (
            "model/model.safetensors (11 bytes) is damaged or cut off. Download or",
            written(WEIGHTS, "not a model"),
        ),
        "a folder": (
            "model holds no weights: expected model.safetensors or",
            both(model(remove(WEIGHTS)), lambda folder: (folder / "model" / WEIGHTS).mkdir()),
        ),
        "a header that is a list": (
            "model/model.safetensors (10 bytes) is damaged or cut off. Download or",
            written(WEIGHTS, struct.pack("<Q", 2) + b"[]"),
        ),
        "a header that is a number": (
            "model/model.safetensors (10 bytes) is damaged or cut off. Download or",
            written(WEIGHTS, struct.pack("<Q", 2) + b"55"),
        ),
        "a header without offsets": (
            "model/model.safetensors (430548 bytes) is damaged or cut off. Download",
            header(lambda table: {name: {"dtype": "F32"} for name in table}),
        ),
        "a header with text for a tensor": (
            "model/model.safetensors (430262 bytes) is damaged or cut off. Download",
            header(lambda table: dict.fromkeys(table, "x")),
        ),
        "a header with odd offsets": (
            "model/model.safetensors (431481 bytes) is damaged or cut off. Download",
            header(lambda table: {n: e | {"data_offsets": ["a", 1]} if "dtype" in e else e for n, e in table.items()}),
        ),
        "a header of 2^63 bytes": (
            "model/model.safetensors (10 bytes) is damaged or cut off. Download or",
            written(WEIGHTS, struct.pack("<Q", 2**63) + b"{}"),
        ),
        "a header nested 10,000 deep": (
            "model/model.safetensors (30008 bytes) is damaged or cut off. Download",
            written(WEIGHTS, struct.pack("<Q", 30_000) + b'{"a":' * 5000 + b"[" * 2500 + b"]" * 2500),
        ),
        "a tensor missing": (
            "model/model.safetensors (431529 bytes) is damaged or cut off. Download",
            header(lambda table: without(table, "q_proj")),
        ),
        "a norm missing": (
            "model/model.safetensors (431534 bytes) is damaged or cut off. Download",
            header(lambda table: without(table, "input_layernorm")),
        ),
        "a tensor of another shape": (
            "model.norm.weight has shape (32, 2); config.json asks for (64,). The",
            header(
                lambda table: table["model.norm.weight"].update(shape=[32, 2]) if "model.norm.weight" in table else None
            ),
        ),
        "a tensor of an unknown dtype": (
            "model/model.safetensors (431641 bytes) is damaged or cut off. Download",
            header(lambda table: table["model.norm.weight"].update(dtype="Q4")),
        ),
        "an index of a missing shard": (
            "model is incomplete: its index names 2 weight files, 1 are missing",
            sharded(
                {
                    "weight_map": {
                        "a": "model-00001-of-00002.safetensors",
                        "b": "model-00002-of-00002.safetensors",
                    }
                }
            ),
        ),
        "an index that points outside": (
            "its weight_map does not say which file beside it holds each tensor.",
            sharded({"weight_map": {"a": "../rows.jsonl"}}),
        ),
        "an index with an absolute path": (
            "its weight_map does not say which file beside it holds each tensor.",
            sharded({"weight_map": {"a": "/etc/passwd"}}),
        ),
        "an index without a map": ("its weight_map does not say which file beside it holds each tensor.", sharded({})),
        "an index that is a list": ("model/model.safetensors.index.json holds a list; expected a JSON", sharded("[]")),
        "an index cut off": (
            "model/model.safetensors.index.json is not valid JSON: Expecting value:",
            sharded('{"weight_map": {"a": '),
        ),
        "an index that maps to a number": (
            "its weight_map does not say which file beside it holds each tensor.",
            sharded({"weight_map": {"a": 5}}),
        ),
        "an index that is empty": (
            "its weight_map does not say which file beside it holds each tensor.",
            sharded({"weight_map": {}}),
        ),
    }.items()
}
