"""The first look: what it refuses at once, and what it leaves to the reading of all records."""

import json
from pathlib import Path
from typing import Any

import pytest

from glora_llm.data.first_look import BYTES, first_look
from glora_llm.errors import UserError
from tests.data.conftest import Settings, write_parquet, write_rows

ALPACA = [{"instruction": f"add {n}", "input": "2", "output": f"{n}"} for n in range(9)]
LABELLED = [{"text": f"{n}", "label": n % 2} for n in range(9)]


def files(folder: Path) -> None:
    write_rows(folder / "alpaca.jsonl", ALPACA)
    (folder / "alpaca.json").write_text(json.dumps(ALPACA))
    write_parquet(folder / "alpaca.parquet", ALPACA)
    (folder / "alpaca.csv").write_text("instruction,input,output\n" + "".join(f"a,,{n}\n" for n in range(500)))
    write_rows(folder / "numbers.jsonl", LABELLED)
    write_rows(folder / "no_input.jsonl", [{"instruction": "a", "output": "b"}] * 9)
    (folder / "empty.jsonl").write_text("\n\n")
    (folder / "header.csv").write_text("text,label\n")
    (folder / "broken.jsonl").write_text('{"text": \n' * 3)
    (folder / "latin.csv").write_bytes(b"text\na\nstra\xdfe\n")
    (folder / "table.xlsx").write_bytes(b"PK\x03\x04")
    (folder / "zip.json").write_bytes(b"PK\x03\x04")
    (folder / "bad.parquet").write_bytes(b"PAR1 nothing PAR1")
    (folder / "other").mkdir()


@pytest.mark.parametrize(
    ("source", "keys", "told"),
    [
        ("alpcaa.jsonl", {}, r"There is no file .*alpcaa\.jsonl\. Did you mean 'alpaca\.jsonl'"),
        ("nowhere/", {}, "There is no file"),
        ("other", {}, "has no file for split 'train'"),
        ("table.xlsx", {}, r"its ending should be one of \.json"),
        ("empty.jsonl", {}, r"empty\.jsonl holds no rows"),
        ("header.csv", {}, r"header\.csv holds no rows"),
        ("broken.jsonl", {}, r"3 of 3 records cannot be used:\n.*broken\.jsonl, line 1: not valid JSON"),
        ("latin.csv", {"format": "text"}, r"latin\.csv, line 3: not UTF-8 text"),
        ("zip.json", {}, "is a zip archive; unpack it"),
        ("bad.parquet", {}, "not a readable parquet file"),
        ("alpaca.jsonl", {"format": "alpcaa"}, "Did you mean 'alpaca'"),
        ("alpaca.jsonl", {"prompt": "{text}"}, "data.prompt does not go with format alpaca"),
        ("alpaca.jsonl", {"columns": {"inptu": "input"}}, "names the role 'inptu'.*Did you mean 'input'"),
        ("alpaca.jsonl", {"test": "tset.jsonl"}, r"There is no file tset\.jsonl"),
        ("alpaca.jsonl", {"test": "numbers.jsonl"}, "9 of 9 test records .*\n.*no column 'instruction'"),
        *((f"alpaca.{end}", {"columns": {"input": "inptu"}}, "names the column 'inptu' for 'input', and no.*'input'")
          for end in ("jsonl", "json", "parquet", "csv")),
        ("alpaca.csv", {"format": "text"}, "100 of 100 first train records .*\n.*There is no column 'text'"),
        ("numbers.jsonl", {"format": "classification"}, "data.labels="),
        ("nowhere.parquet", {"format": "images", "max_tokens": 0}, r"There is no file nowhere\.parquet"),
    ],
)  # fmt: skip
def test_what_is_refused(
    source: str, keys: dict[str, Any], told: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        first_look(settings(**{"format": "alpaca", "source": source, **keys}))


@pytest.mark.parametrize(
    ("source", "keys"),
    [
        ("alpaca.csv", {}),
        ("no_input.jsonl", {}),
        (["alpaca.json", "no_input.jsonl"], {"columns": {"input": "input"}}),
        ("long.jsonl", {"columns": {"input": "context"}}),
        ("long.jsonl", {"format": "text", "bad_rows": "skip"}),
        ("embedded:banking77", {"format": "classification", "test": "test"}),
        ("someone/some_set", {"format": "classification", "test": "numbers.jsonl"}),
        ("numbers.jsonl", {"format": "classification", "labels": ["no", "yes"]}),
        ("embedded:tinyshakespeare", {"format": "text", "overlong": "split"}),
        ("embedded:shapes", {"format": "images", "max_tokens": 0, "test": "test"}),
    ],
)
def test_what_is_left_to_the_reading_of_all_records(
    source: Any, keys: dict[str, Any], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """long.jsonl has more than a MiB of records without an input, then one with it under another name."""
    files(tmp_path)
    rows = [{"instruction": "a", "output": "b" * (BYTES // 4)}] * 9
    write_rows(tmp_path / "long.jsonl", [*rows, {"instruction": "a", "context": "c", "output": "b"}])
    monkeypatch.chdir(tmp_path)
    first_look(settings(**{"format": "alpaca", "source": source, **keys}))


def test_names_of_classes_may_stand_in_one_file_of_two(settings: Settings, tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    source = write_parquet(tmp_path / "a.parquet", LABELLED, features)
    test = write_rows(tmp_path / "t.jsonl", LABELLED)
    first_look(settings(format="classification", source=source, test=test))
