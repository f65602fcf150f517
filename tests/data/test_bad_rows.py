"""Records that cannot be used: listed together with file and line, or left out, counted and bounded."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from glora_llm.data import Prepared, prepare
from glora_llm.data.first_look import first_look
from glora_llm.data.prepare import training_texts
from glora_llm.data.readers import read_file
from glora_llm.errors import UserError
from glora_llm.schema import DataSection
from tests.data.conftest import Settings, write_rows

GOOD = [{"instruction": f"add {n}", "output": f"{n + 1}"} for n in range(30)]
USER, TOOL = {"role": "user", "content": "hi"}, {"name": "f", "arguments": "{}"}
TURNS = {
    "no assistant": [USER],
    "weight 0": [USER, {"role": "assistant", "content": "x", "weight": 0}],
    "tool call": [USER, {"role": "assistant", "content": None, "tool_calls": [TOOL]}],
    "null": [USER, {"role": "assistant", "content": None}],
    "image": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    "list role": [{"role": ["user"], "content": "x"}],
    "mapping role": [{"role": {"name": "user"}, "content": "x"}],
    "assistant first": [{"role": "assistant", "content": "x"}],
    "nan": [USER, {"role": "assistant", "content": float("nan")}],
    "surrogate": [USER, {"role": "assistant", "content": "cut \ud83d"}],
}
REASONS = {
    "no turn of the assistant to learn": 2, "a turn that only calls tools": 1, "null": 1,
    "parts that are no text, such as images": 1, "an unknown role": 2, "a float": 1, "half of a surrogate pair": 1,
    "a conversation that begins with the assistant": 1,
}  # fmt: skip


def prepared(chosen: Any, tokenizer: Any, tmp_path: Path) -> Prepared:
    return prepare(chosen, tokenizer, tmp_path / "cache", seed=0)


def write_lines(path: Path, lines: list[str]) -> str:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def test_an_error_lists_ten_of_all_with_file_and_line(tmp_path: Path, settings: Settings, plain: Any) -> None:
    rows: list[Any] = [*GOOD[:20], *({"instruction": "x"} for _ in range(12)), *GOOD[20:]]
    lines = [json.dumps(row) for row in rows]
    lines[2], lines[4], lines[6] = '{"instruction": ', "[1]", '{"instruction": "x", "output": ["a", "b"]}'
    lines.insert(3, "")
    chosen = settings(format="alpaca", source=write_lines(tmp_path / "a.jsonl", lines), validation=4)
    with pytest.raises(UserError) as told:
        prepared(chosen, plain, tmp_path)
    message = str(told.value).replace(str(tmp_path), "")
    head, *listed, advice = message.splitlines()
    assert head == "15 of 42 train records cannot be used; the first 10:"
    assert len(listed) == 10 and listed[0].startswith("  /a.jsonl, line 3: not valid JSON: Expecting value")
    assert listed[1] == '  /a.jsonl, line 6: expected an object such as {"text": ...}, got [1]'
    assert listed[2].startswith("  /a.jsonl, line 8: Column 'output' should hold a text and holds a list: ['a', 'b']")
    assert listed[3].startswith("  /a.jsonl, line 22: There is no column 'output'; the columns are: instruction")
    assert listed[4:] == [f"  /a.jsonl, line {n}: the same" for n in range(23, 29)]
    assert "data.bad_rows=skip data.max_bad_rows=0.36" in advice
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_what_only_shows_when_rendered_is_in_the_same_list(tmp_path: Path, settings: Settings, chatml: Any) -> None:
    good = [{"messages": [USER, {"role": "assistant", "content": f"{n}"}]} for n in range(30)]
    rows: list[dict[str, Any]] = [*good, *({"messages": turns} for turns in TURNS.values())]
    chosen = settings(format="chat", source=write_rows(tmp_path / "a.jsonl", rows), validation=0.1)
    with pytest.raises(UserError, match="10 of 40 train records cannot be used:") as told:
        prepared(chosen, chatml, tmp_path)
    listed = str(told.value).splitlines()[1:-1]
    assert [line.split("a.jsonl, ")[1].split(":")[0] for line in listed] == [f"line {n}" for n in range(31, 41)]
    skipped = chosen.model_copy(update={"bad_rows": "skip", "max_bad_rows": 0.25})
    data = prepared(skipped, chatml, tmp_path)
    assert data.reports["train"].bad == REASONS and len(data.train) + len(data.validation or []) == 30
    described = data.reports["train"].describe()
    assert "10 bad ones left out" in described and "left out: 2 x an unknown role; the first: " in described
    assert "a.jsonl, line 33: " in described and data.reports["validation"].bad == {}
    with pytest.raises(UserError, match=r"9 of 40 train records .* more than data.max_bad_rows=0.2 ") as told:
        prepared(skipped.model_copy(update={"max_bad_rows": 0.2}), chatml, tmp_path)
    assert "set data.max_bad_rows=0.23" in str(told.value) and "1 x a turn that only calls tools" in str(told.value)


def test_skipped_rows_leave_the_samples_of_the_good_ones(tmp_path: Path, settings: Settings, plain: Any) -> None:
    lines = [json.dumps(row) for row in GOOD]
    keys = {"format": "alpaca", "validation": 5, "test": 0.1}
    good = prepared(settings(source=write_lines(tmp_path / "a.jsonl", lines), **keys), plain, tmp_path)
    lines[7:7] = ["{", '{"instruction": null, "output": "x"}']
    source = write_lines(tmp_path / "b.jsonl", lines)
    skip = settings(source=source, bad_rows="skip", max_bad_rows=0.1, **keys)
    left = prepared(skip, plain, tmp_path)
    assert left.train.digest() == good.train.digest() and left.folder != good.folder
    assert prepared(skip, plain, tmp_path).reports == left.reports and left.reports["train"].bad == {
        "not valid JSON": 1, "null in column 'instruction'": 1,
    }  # fmt: skip
    with pytest.raises(UserError, match="2 of 32 train records cannot be used"):
        prepared(settings(source=source, **keys), plain, tmp_path)
    assert sorted(training_texts(skip, 0)[1]()) != [] == [*left.reports["test"].bad]
    with pytest.raises(UserError, match="2 of 32 train records cannot be used"):
        training_texts(settings(source=source, **keys), 0)[1]()


def test_bad_rows_of_a_held_out_file_are_bounded_by_themselves(tmp_path: Path, settings: Settings, plain: Any) -> None:
    source = write_rows(tmp_path / "a.jsonl", GOOD)
    test = write_rows(tmp_path / "t.jsonl", [*GOOD[:2], {"output": "x"}])
    chosen = settings(format="alpaca", source=source, test=test, bad_rows="skip", max_bad_rows=0.2)
    with pytest.raises(UserError, match="1 of 3 test records cannot be used"):
        prepared(chosen, plain, tmp_path)
    data = prepared(chosen.model_copy(update={"max_bad_rows": 0.5}), plain, tmp_path)
    assert data.reports["test"].bad == {"no column 'instruction'": 1} and len(data.test or []) == 2


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", 'text,label\n"two\nlines",a\nx\ny,b\n', r"1 of 3 records .*\n.*a\.csv, line 4: the header has 2"),
        ("a.csv", "text,text\na,b\n", "line 1: the header names the column 'text' twice"),
        ("a.csv", 'text,label\n"a\nb" x,c\n', r"line 2: not valid CSV.*\(line 3\)"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', "line 1: the key 'text' stands there twice"),
        ("a.jsonl", '{"text": ' + "[" * 200_000 + "]" * 200_000 + "}\n", "line 1: not readable JSON: brackets"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}\n", "line 1: not readable JSON: Exceeds the limit"),
        ("a.json", "[" * 200_000, "a.json: not readable JSON: brackets nest too deep"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "stra\xdfe"}\n', "line 2: not UTF-8 text: byte 0xdf"),
        ("a.txt", b"a\nstra\xdfe\n", r"a\.txt, line 2: not UTF-8 text \(byte 0xdf\)"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "is UTF-16 text; convert it: iconv -f utf-16"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", "compressed by gzip; unpack it"),
        ("a.jsonl", "\x1b[31m\n", r"not valid JSON.*\\x1b\[31m"),
    ],
)  # fmt: skip
def test_odd_files(name: str, content: str | bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=told):
        read_file(tmp_path / name)


@pytest.mark.parametrize("label", [float("nan"), float("inf"), "²", "--5", [1], {"a": 1}])
def test_odd_labels_are_bad_rows(label: Any, tmp_path: Path, settings: Settings, plain: Any) -> None:
    rows = [{"text": f"{n}", "label": n % 2} for n in range(9)]
    source = write_rows(tmp_path / "a.jsonl", [*rows, {"text": "x", "label": label}])
    chosen = settings(format="classification", labels=["no", "yes"], source=source)
    with pytest.raises(UserError, match=r"1 of 10 train records .*\n.*a\.jsonl, line 10: "):
        prepared(chosen, plain, tmp_path)


def test_a_csv_field_of_any_length_is_read(tmp_path: Path) -> None:
    long = "word " * 40_000
    (tmp_path / "a.csv").write_text(f'text,label\n"{long}",a\n')
    assert read_file(tmp_path / "a.csv").rows == [{"text": long, "label": "a"}]


def test_a_damaged_parquet_file_is_one_message(tmp_path: Path) -> None:
    """A bit is flipped in every byte of the file, one byte at a time."""
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    rows = pyarrow.table({"text": [f"text {n}" for n in range(50)]})
    features = {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}
    rows = rows.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(rows, path, write_page_checksum=True)
    whole, told = path.read_bytes(), 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        for read in (read_file, lambda file: first_look(DataSection(format="text", source=str(file), max_tokens=8))):
            try:
                read(path)
            except UserError as error:
                assert any(words in str(error) for words in ("a.parquet: not a readable", "'text'"))
                told += 1
    assert told > len(whole) // 7 // 4


def test_a_pipe_is_refused(tmp_path: Path, settings: Settings, plain: Any) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        prepared(settings(source=str(tmp_path / "a.jsonl")), plain, tmp_path)
