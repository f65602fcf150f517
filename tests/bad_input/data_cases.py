"""Records: JSON, CSV, parquet, their columns and labels."""

import io
import json
from pathlib import Path
from typing import Any

from tests.bad_input.case import Case, Change, bad, both, file


def rows(*found: object, times: int = 20) -> Change:
    """Return what writes rows.jsonl: some records, often; JSON text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in found]
    return file("rows.jsonl", "".join(f"{line}\n" for line in lines) * times)


def one_bad(row: object) -> Change:
    """Return what writes twenty good records and a bad one."""
    good = [json.dumps({"prompt": f"p {n}", "completion": f" c {n}"}) for n in range(20)]
    text = row if isinstance(row, str) else json.dumps(row)
    return file("rows.jsonl", "\n".join([*good, text]) + "\n")


def parquet(columns: dict[str, list[Any]], flipped: int | None = None, cut: int | None = None) -> Change:
    def change(folder: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        stream = io.BytesIO()
        table = pyarrow.table(columns)
        pyarrow.parquet.write_table(table, stream, write_page_checksum=True, compression="snappy")
        content = bytearray(stream.getvalue())
        if flipped is not None:
            content[flipped] ^= 1
        (folder / "rows.parquet").write_bytes(bytes(content[:cut]))

    return change


def csv(text: str) -> Change:
    return file("rows.csv", text)


PAIRS = {"prompt": [f"p {n}" for n in range(20)], "completion": [f" c {n}" for n in range(20)]}
CSV = "prompt,completion\n" + "".join(f"p {n}, c {n}\n" for n in range(20))
DEEP = '{"prompt": "a", "completion": ' + "[" * 10_000 + "]" * 10_000 + "}"
LONG = '{"prompt": "a", "completion": ' + "9" * 5000 + "}"
RECORDS: dict[str, Case] = {
    "a file that is not there": bad(
        "There is no file none.jsonl. Did you mean 'rows.jsonl'? Set GLORA_DATA", "data.source=none.jsonl"
    ),
    "an empty file": bad("rows.jsonl holds no rows.", change=file("rows.jsonl", "")),
    "blank lines alone": bad("rows.jsonl holds no rows.", change=file("rows.jsonl", "\n\n\n")),
    "an ending that is not read": bad(
        "Cannot read rows.xlsx: its ending should be one of .json, .jsonl,",
        "data.source=rows.xlsx",
        change=file("rows.xlsx", "x"),
    ),
    "gzip": bad(
        "rows.jsonl should be UTF-8 text and is compressed by gzip; unpack it:",
        change=file("rows.jsonl", b"\x1f\x8b\x08\0\0\0\0\0"),
    ),
    "UTF-16": bad(
        "rows.jsonl should be UTF-8 text and is UTF-16 text; convert it: iconv",
        change=file("rows.jsonl", '{"prompt": "a"}'.encode("utf-16")),
    ),
    "latin1": bad(
        "not UTF-8 text: byte 0xe9; convert the file, for example with: iconv",
        change=file("rows.jsonl", '{"prompt": "caf\xe9", "completion": "a"}'.encode("latin1")),
    ),
    "null bytes": bad("not valid JSON: Expecting value at column 1:", change=file("rows.jsonl", b"\0" * 100)),
    "no JSON in line 21": bad("not valid JSON: Expecting value at column 1: not json", change=one_bad("not json")),
    "JSON cut off": bad(
        'not valid JSON: Invalid control character at at column 23: {"prompt":',
        change=one_bad('{"prompt": "a", "compl'),
    ),
    "a list for a record": bad('expected an object such as {"text": ...}, got [1, 2]', change=one_bad("[1, 2]")),
    "a text for a record": bad('expected an object such as {"text": ...}, got text', change=one_bad('"text"')),
    "NaN as text": bad(
        "Column 'completion' should hold a text and holds nan", change=one_bad('{"prompt": "a", "completion": NaN}')
    ),
    "Infinity as text": bad(
        "Column 'prompt' should hold a text and holds inf", change=one_bad('{"prompt": Infinity, "completion": "b"}')
    ),
    "null as prompt": bad(
        "Column 'prompt' should hold a text and holds null", change=one_bad({"prompt": None, "completion": "b"})
    ),
    "a mapping as text": bad(
        "Column 'prompt' should hold a text and holds a dict: {'a': 1}",
        change=one_bad({"prompt": {"a": 1}, "completion": "b"}),
    ),
    "a list as text": bad(
        "Column 'completion' should hold a text and holds a list: ['b']",
        change=one_bad({"prompt": "a", "completion": ["b"]}),
    ),
    "JSON nested 10,000 deep": bad("not readable JSON: brackets nest too deep", change=one_bad(DEEP)),
    "an integer of 5,000 digits": bad(
        "not readable JSON: Exceeds the limit (4300 digits) for integer string", change=one_bad(LONG)
    ),
    "half of a surrogate pair": bad(
        "character 1 is half of a surrogate pair, which is no character: '\\ud83d'",
        change=one_bad('{"prompt": "\\ud83d", "completion": "b"}'),
    ),
    "a key twice": bad(
        "the key 'prompt' stands there twice; keep one",
        change=one_bad('{"prompt": "a", "prompt": "b", "completion": "c"}'),
    ),
    "a column that is missing": bad(
        "There is no column 'completion'; the columns are: prompt, answer. Did",
        change=one_bad({"prompt": "a", "answer": "b"}),
    ),
    "columns of another format": bad(
        "20 of 20 train records cannot be used; the first 10:", change=rows({"instruction": "a", "output": "b"})
    ),
    "a misspelt column": bad(
        "data.columns names the column 'completoin' for 'completion', and no", "data.columns={completion: completoin}"
    ),
    "a misspelt optional column": bad(
        "data.columns names the column 'inptu' for 'input', and no training row",
        "data.format=alpaca",
        "data.columns={input: inptu}",
        change=rows({"instruction": "a", "input": "b", "output": "c"}),
    ),
    "a role that the format has not": bad(
        "data.columns names the role 'answer'; format prompt_completion has:", "data.columns={answer: completion}"
    ),
    "JSON list nested 10,000 deep": bad(
        "not readable JSON: brackets nest too deep", "data.source=rows.json", change=file("rows.json", "[" * 10_000)
    ),
    "a JSON number": bad(
        'expected a list such as [{"text": ...}, ...], got 5', "data.source=rows.json", change=file("rows.json", "5")
    ),
    "a JSON list of numbers": bad(
        'rows.json, row 1: expected an object such as {"text": ...}, got 1',
        "data.source=rows.json",
        change=file("rows.json", "[1, 2]"),
    ),
    "one record, and validation": bad(
        "at least 1 must be held out and 1 stay for training. Give a number",
        change=rows({"prompt": "a", "completion": " b"}, times=1),
    ),
    "more held out than there is": bad(
        "at least 1 must be held out and 1 stay for training. Give a number", "data.validation=0.99", "data.test=0.5"
    ),
    "a validation file that is not there": bad(
        "There is no file none.jsonl. Did you mean 'rows.jsonl'? Set GLORA_DATA", "data.validation=none.jsonl"
    ),
    "a split of a file": bad(
        "'valid' is no file, and no split either: data.source is the file", "data.validation=valid"
    ),
    "the same share twice, all held out": bad(
        "at least 1 must be held out and 1 stay for training. Give a number", "data.validation=20"
    ),
    "every sample too long": bad(
        "No train sample is left: all 16 are longer than data.max_tokens=4 (the", "data.max_tokens=4"
    ),
    "a sample too long": bad(
        "1 of 17 train samples are longer than data.max_tokens=64; the longest",
        "data.overlong=error",
        change=one_bad({"prompt": "a" * 99, "completion": " b"}),
    ),
    "an unknown format": bad(
        "Unknown data format 'alpacca'; there is: alpaca, chat, classification,", "data.format=alpacca"
    ),
    "a template without a column": bad(
        "data.prompt 'Question' names no column, so every row would read the", "data.prompt=Question"
    ),
    "a template with an open brace": bad(
        "data.prompt 'Question {prompt': expected '}' before end of string;", "data.prompt='Question {prompt'"
    ),
    "a template that is a mapping": bad(
        "{text}: data.prompt: got {'Question': {'text': None}} (mapping),", "data.prompt=Question: {text}"
    ),
    "a template's column that is not there": bad(
        "20 of 20 train records cannot be used; the first 10:", "data.prompt='{question}'"
    ),
    "labels of another format": bad(
        "data.labels does not go with format prompt_completion: it belongs to", "data.labels=[a, b]"
    ),
    "a source that is an empty list": bad(
        "data.source is an empty list; name at least one file, folder or hub", "data.source=[]"
    ),
    "a source that is a number": bad("data.source: got 5 (integer), expected text or a list.", "data.source=5"),
    "a pipe": bad(
        "pipe.jsonl is neither a file nor a folder; write what it gives into a",
        "data.source=pipe.jsonl",
        change=lambda folder: __import__("os").mkfifo(folder / "pipe.jsonl"),
    ),
    "a folder without the split": bad(
        "Folder data has no file for split 'train': expected train or training",
        "data.source=data",
        change=file("data/other.jsonl", "{}"),
    ),
    "a folder of two splits": bad(
        "Folder data has several files for split 'train': train.csv,",
        "data.source=data",
        change=both(file("data/train.jsonl", "{}"), file("data/train.csv", "a")),
    ),
    "an unknown embedded data set": bad(
        "Unknown embedded data set 'banking7'; there is: banking77, gsm8k,", "data.source=embedded:banking7"
    ),
    "a hub data set without a network": bad(
        "'nobody/nothing' is no file or folder here, and as a hub data set", "data.source=nobody/nothing"
    ),
    "blank answers alone": bad(
        "The answers of all 20 train rows are blank: there is nothing to learn",
        change=rows({"prompt": "a", "completion": ""}),
    ),
    "blank lines and a byte order mark": bad(
        "",
        change=file(
            "rows.jsonl",
            "\ufeff" + "\n\n".join(json.dumps({"prompt": f"p {n}", "completion": f" c {n}"}) for n in range(20)),
        ),
    ),
}
TABLES: dict[str, Case] = {
    "a header that names a column twice": bad(
        "the header names the column 'prompt' twice; rename one.",
        "data.source=rows.csv",
        change=csv(CSV.replace("prompt,completion", "prompt,completion,prompt")),
    ),
    "a row with a field too many": bad(
        "the header has 2 columns and this row has more; put quotes around a",
        "data.source=rows.csv",
        change=csv(CSV + "a,b,c\n"),
    ),
    "a row with a field too few": bad(
        "the header has 2 columns and this row has fewer; put quotes around a",
        "data.source=rows.csv",
        change=csv(CSV + "a\n"),
    ),
    "an open quote": bad(
        "not valid CSV: unexpected end of data (line 22); JSON lines may be",
        "data.source=rows.csv",
        change=csv(CSV + '"a,b\n'),
    ),
    "semicolons": bad(
        "20 of 20 train records cannot be used; the first 10:",
        "data.source=rows.csv",
        change=csv(CSV.replace(",", ";")),
    ),
    "no header": bad(
        "19 of 19 train records cannot be used; the first 10:",
        "data.source=rows.csv",
        change=csv(CSV.partition("\n")[2]),
    ),
    "a header alone": bad("rows.csv holds no rows.", "data.source=rows.csv", change=csv("prompt,completion\n")),
    "a field of 200,000 characters": bad("", "data.source=rows.csv", change=csv(CSV + f'"{"x" * 200_000}"," c"\n')),
    "parquet cut off": bad(
        "not a readable parquet file: Parquet magic bytes not found in footer.",
        "data.source=rows.parquet",
        change=parquet(PAIRS, cut=300),
    ),
    "parquet that is text": bad(
        "not a readable parquet file: Parquet magic bytes not found in footer.",
        "data.source=rows.parquet",
        change=file("rows.parquet", CSV),
    ),
    "parquet with a flipped bit": bad(
        "not a readable parquet file: Corrupt snappy compressed data.; download",
        "data.source=rows.parquet",
        change=parquet(PAIRS, flipped=60),
    ),
    "parquet of bytes": bad(
        "20 of 20 train records cannot be used; the first 10:",
        "data.source=rows.parquet",
        change=parquet({"prompt": [b"\xff"] * 20, "completion": [b"\xff"] * 20}),
    ),
    "parquet with NaN as text": bad(
        "20 of 20 train records cannot be used; the first 10:",
        "data.source=rows.parquet",
        change=parquet({"prompt": PAIRS["prompt"], "completion": [float("nan")] * 20}),
    ),
    "parquet without a row": bad(
        "rows.parquet holds no rows.", "data.source=rows.parquet", change=parquet({"prompt": [], "completion": []})
    ),
}
