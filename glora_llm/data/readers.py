"""One file -> its rows. A reader is chosen by the file's ending."""

import csv
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from typing import IO

from glora_llm.data.columns import Row
from glora_llm.errors import UserError

DOCUMENT_CHARS = 16_384


@dataclass
class Table:
    """Rows, and the names of class numbers by column, where the file or data set states them."""

    rows: list[Row]
    label_names: dict[str, list[str]] = field(default_factory=dict)


def read_json(stream: IO[bytes], name: str) -> Table:
    """Read a list of objects, an object whose `data` is such a list, or one object a line (JSON lines).

    Raises:
        UserError: for anything else; bad JSON is named with its line.
    """
    content = stream.read()
    try:
        parsed = json.loads(content)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return read_jsonl(io.BytesIO(content), name)
        raise UserError(f"{name}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from error
    if isinstance(parsed, dict) and isinstance(parsed.get("data"), list):
        parsed = parsed["data"]
    if isinstance(parsed, dict):
        parsed = [parsed]
    odd = (
        next((n for n, row in enumerate(parsed, 1) if not isinstance(row, dict)), 0) if isinstance(parsed, list) else 1
    )
    if odd:
        raise UserError(f'{name}: row {odd} is not an object; expected a list such as [{{"text": ...}}, ...]')
    return Table(parsed)


def read_jsonl(stream: IO[bytes], name: str) -> Table:
    """Read one JSON object a line; empty lines do not count.

    Raises:
        UserError: for a line that is not an object, with its number.
    """
    rows = []
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{name}, line {number}: not valid JSON: {error.msg} at column {error.colno}: "
                f"{line[:80].decode(errors='replace').strip()}"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f'{name}, line {number}: expected an object such as {{"text": ...}}, got {str(row)[:80]}')
        rows.append(row)
    return Table(rows)


def _read_separated(stream: IO[bytes], name: str, separator: str) -> Table:
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.DictReader(lines, delimiter=separator, strict=True)
    rows: list[Row] = []
    try:
        for row in reader:
            if None in row or None in row.values():
                fields = len(reader.fieldnames or ())
                raise UserError(
                    f"{name}, line {reader.line_num}: the header has {fields} columns and this row has "
                    f"{'more' if None in row else 'fewer'}; put quotes around a text that holds a '{separator}'"
                )
            rows.append(row)
    except csv.Error as error:
        raise UserError(
            f"{name}, line {reader.reader.line_num}: not valid CSV: {error}; JSON lines may be easier"
        ) from error
    return Table(rows)


def read_csv(stream: IO[bytes], name: str) -> Table:
    """Read comma-separated values with a header; every value is text.

    Raises:
        UserError: for bad quotes and for a row of another length than the header, with its line.
    """
    return _read_separated(stream, name, ",")


def read_tsv(stream: IO[bytes], name: str) -> Table:
    """Read tab-separated values with a header; every value is text.

    Raises:
        UserError: as `read_csv`.
    """
    return _read_separated(stream, name, "\t")


def read_parquet(stream: IO[bytes], name: str) -> Table:
    """Read a parquet file; the names of class labels come from the metadata that `datasets` writes.

    Raises:
        UserError: when it is not a parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.PythonFile(stream, mode="r"))
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{name}: not a readable parquet file: {error}") from error
    stated = (table.schema.metadata or {}).get(b"huggingface", b"{}")
    features = (json.loads(stated).get("info") or {}).get("features") or {}
    names = {c: f["names"] for c, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
    return Table(table.to_pylist(), names)


def read_lines(stream: IO[bytes], name: str) -> Table:
    """Read plain text: a row for every line that is not blank."""
    return Table([{"text": line.rstrip("\n")} for line in _decoded(stream) if line.strip()])


def read_documents(stream: IO[bytes], name: str) -> Table:
    """Read plain text in long pieces: a row for every 16 Ki characters or so.

    A piece ends at a line's end, at a blank line where there is one; together the pieces are the whole file.
    """
    rows: list[Row] = []
    held: list[str] = []
    size = 0
    for line in _decoded(stream):
        held.append(line)
        size += len(line)
        if size >= 2 * DOCUMENT_CHARS or (size >= DOCUMENT_CHARS and not line.strip()):
            rows.append({"text": "".join(held)})
            held, size = [], 0
    return Table([row for row in [*rows, {"text": "".join(held)}] if row["text"].strip()])


def _decoded(stream: IO[bytes]) -> io.TextIOWrapper:
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline=None)


READERS: dict[str, Callable[[IO[bytes], str], Table]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".txt": read_lines,
}


def suffix(name: str) -> str:
    """Return the ending of a file name, in small letters and with its dot; empty when there is none."""
    stem, dot, ending = name.rpartition(".")
    return f".{ending.lower()}" if dot and stem else ""


def read_file(file: Traversable, documents: bool = False) -> Table:
    """Return the rows of one file.

    Args:
        documents: read a .txt file in long pieces instead of line by line.

    Raises:
        UserError: for an unknown ending, broken content, and text that is not UTF-8.
    """
    ending = suffix(file.name)
    if ending not in READERS:
        raise UserError(f"Cannot read {file}: its ending should be one of {', '.join(READERS)}, and is '{ending}'")
    read = read_documents if documents and ending == ".txt" else READERS[ending]
    try:
        with file.open("rb") as stream:
            return read(stream, str(file))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 text (byte {error.object[error.start]:#04x} at {error.start}); convert it, "
            f"for example with: iconv -f latin1 -t utf-8"
        ) from error


def join(tables: Iterable[tuple[str, Table]]) -> Table:
    """Return one table of all rows.

    Args:
        tables: where each table comes from, and the table.

    Raises:
        UserError: when one is empty, or two name the class numbers of one column differently.
    """
    joined = Table([])
    for origin, table in tables:
        if not table.rows:
            raise UserError(f"{origin} holds no rows.")
        for column, names in table.label_names.items():
            if joined.label_names.setdefault(column, names) != names:
                raise UserError(
                    f"{origin} numbers the classes of column '{column}' differently from the one before it."
                )
        joined.rows += table.rows
    return joined
