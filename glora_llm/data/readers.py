"""One file -> its rows. A reader is chosen by the file's ending."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from importlib.resources.abc import Traversable
from itertools import islice
from typing import IO, Any

from glora_llm.data.bad_rows import BadRows, RowError
from glora_llm.data.columns import Row
from glora_llm.data.json_rows import LATIN, read_json, read_jsonl
from glora_llm.data.table import Table
from glora_llm.errors import UserError

DOCUMENT_CHARS = 16_384
# First bytes of files that are no UTF-8 text -> how to make them so.
DISGUISED = {
    b"\x1f\x8b": "compressed by gzip; unpack it: gunzip -c FILE > NEW",
    b"PK\x03\x04": "a zip archive; unpack it: unzip FILE",
    b"\xff\xfe": "UTF-16 text; convert it: iconv -f utf-16 -t utf-8 FILE > NEW",
    b"\xfe\xff": "UTF-16 text; convert it: iconv -f utf-16 -t utf-8 FILE > NEW",
}


def numbered(rows: list[Row], name: str) -> list[str]:
    """Return the places of rows of a file without lines."""
    return [f"{name}, row {number}" for number in range(1, len(rows) + 1)]


def read_separated(stream: IO[bytes], name: str, separator: str, bad: BadRows, most: int | None = None) -> Table:
    """Read values between separators, with a header; every value is text.

    Args:
        most: read at most so many records; None: all.

    Raises:
        UserError: for bad quotes and for a header that names a column twice, with the line.
    """
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    before = csv.field_size_limit(2**31 - 1)  # a long text is no error
    try:
        records = islice(_records(csv.reader(lines, delimiter=separator, strict=True), name), most and most + 1)
        return _separated(records, name, separator, bad)
    finally:
        csv.field_size_limit(before)


def _separated(records: Iterable[tuple[int, list[str]]], name: str, separator: str, bad: BadRows) -> Table:
    table = Table([])
    header: list[str] = []
    for line, fields in records:
        if not header:
            header = fields
            twice = next((column for column in header if header.count(column) > 1), None)
            if twice is not None:
                raise UserError(f"{name}, line {line}: the header names the column '{twice}' twice; rename one.")
        elif len(fields) == len(header):
            table.add(dict(zip(header, fields, strict=True)), f"{name}, line {line}")
        else:
            more = "more" if len(fields) > len(header) else "fewer"
            message = (
                f"the header has {len(header)} columns and this row has {more}; put quotes around a text that holds a "
                f"'{separator}'"
            )
            bad.add(f"{name}, line {line}", RowError("another number of columns than the header", message))
    return table


def _records(reader: Any, name: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line that each record begins on, and its fields.

    Raises:
        UserError: for bad quotes: nobody knows where the next record begins.
    """
    line = 1
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{name}, line {line}: not valid CSV: {error} (line {reader.line_num}); JSON lines may be easier"
        ) from error


def read_csv(stream: IO[bytes], name: str, bad: BadRows) -> Table:
    """Read comma-separated values, as `read_separated`."""
    return read_separated(stream, name, ",", bad)


def read_tsv(stream: IO[bytes], name: str, bad: BadRows) -> Table:
    """Read tab-separated values, as `read_separated`."""
    return read_separated(stream, name, "\t", bad)


def read_parquet(stream: IO[bytes], name: str, bad: BadRows) -> Table:
    """Read a parquet file; the names of class labels come from the metadata that `datasets` writes.

    Raises:
        UserError: when it is not a parquet file, or is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.PythonFile(stream, mode="r")
        table = pyarrow.parquet.read_table(file, page_checksum_verification=True)
        rows = table.to_pylist()
        return Table(rows, class_names(table.schema.metadata), numbered(rows, name))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: not a readable parquet file: {error}; download or write it again") from error


def class_names(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return column -> names of its class numbers, from the metadata of a parquet file.

    Raises:
        OSError: when the metadata are damaged.
    """
    try:
        features = (json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info") or {}).get("features") or {}
        return {c: f["names"] for c, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, AttributeError) as error:
        raise OSError(f"its metadata are damaged ({error})") from error


def read_lines(stream: IO[bytes], name: str, bad: BadRows) -> Table:
    """Read plain text: a row for every line that is not blank."""
    table = Table([])
    for number, line in enumerate(_decoded(stream), 1):
        if line.strip():
            table.add({"text": line.rstrip("\n")}, f"{name}, line {number}")
    return table


def read_documents(stream: IO[bytes], name: str, bad: BadRows) -> Table:
    """Read plain text in long pieces: a row for every 16 Ki characters or so.

    A piece ends at a line's end, at a blank line where there is one; together the pieces are the whole file.
    """
    table, held, size, first = Table([]), [], 0, 1
    for number, line in enumerate(_decoded(stream), 1):
        held.append(line)
        size += len(line)
        if size >= 2 * DOCUMENT_CHARS or (size >= DOCUMENT_CHARS and not line.strip()):
            table.add({"text": "".join(held)}, f"{name}, line {first}")
            held, size, first = [], 0, number + 1
    table.add({"text": "".join(held)}, f"{name}, line {first}")
    kept = [n for n, row in enumerate(table.rows) if row["text"].strip()]
    return Table([table.rows[n] for n in kept], places=[table.places[n] for n in kept])


def _decoded(stream: IO[bytes]) -> io.TextIOWrapper:
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline=None)


READERS: dict[str, Callable[[IO[bytes], str, BadRows], Table]] = {
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


def read_file(file: Traversable, documents: bool = False, bad: BadRows | None = None) -> Table:
    """Return the rows of one file.

    Args:
        documents: read a .txt file in long pieces instead of line by line.
        bad: takes in the records that cannot be read; None: they are an error.

    Raises:
        UserError: for an unknown ending, broken content, and text that is not UTF-8.
    """
    ending = suffix(file.name)
    if ending not in READERS:
        raise UserError(f"Cannot read {file}: its ending should be one of {', '.join(READERS)}, and is '{ending}'")
    read = read_documents if documents and ending == ".txt" else READERS[ending]
    found = BadRows() if bad is None else bad
    try:
        with file.open("rb") as stream:
            require_text(stream, str(file), ending)
            table = read(stream, str(file), found)
    except UnicodeDecodeError as error:
        line = _undecodable(file)
        raise UserError(
            f"{file}, line {line}: not UTF-8 text (byte {error.object[error.start]:#04x}); {LATIN}"
        ) from error
    if bad is None or not table.rows:
        found.records = len(table.rows) + found.count
        found.require_none()
    return table


def require_text(stream: IO[bytes], name: str, ending: str) -> None:
    """Check that a file does not begin as compressed or UTF-16 content does; the stream stays at its begin.

    Raises:
        UserError: with the command that makes text of it.
    """
    begin = stream.read(4)
    stream.seek(0)
    found = next((how for mark, how in DISGUISED.items() if begin.startswith(mark)), None)
    if found and ending != ".parquet":
        raise UserError(f"{name} should be UTF-8 text and is {found}")


def _undecodable(file: Traversable) -> int:
    """Return the number of the first line that is not UTF-8."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0
