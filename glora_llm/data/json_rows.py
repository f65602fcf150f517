"""JSON -> rows: a list of objects, or one object a line."""

import io
import json
from typing import IO, Any

from glora_llm.data.bad_rows import BadRows, RowError
from glora_llm.data.columns import Row
from glora_llm.data.table import Table
from glora_llm.errors import UserError

LATIN = "convert the file, for example with: iconv -f latin1 -t utf-8 FILE > NEW"
NO_OBJECT = 'expected an object such as {"text": ...}, got '


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    """Return a JSON object, after checking that no key stands in it twice: the last would win unseen."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError("a key that stands there twice", f"the key '{twice}' stands there twice; keep one")
    return row


def _parse(content: bytes) -> Any:
    """Return what JSON text says.

    Raises:
        RowError: when it nests too deep, holds a number of too many digits, or a key twice.
        json.JSONDecodeError, UnicodeDecodeError: as json.loads.
    """
    try:
        return json.loads(content, object_pairs_hook=_unique)
    except RecursionError as error:
        raise RowError("JSON that nests too deep", "not readable JSON: brackets nest too deep") from error
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError as error:  # the one that is left: more digits than int() takes
        raise RowError("a number of too many digits", f"not readable JSON: {error}") from error


def read_json(stream: IO[bytes], name: str, bad: BadRows) -> Table:
    """Read a list of objects, an object whose `data` is such a list, or one object a line (JSON lines).

    Raises:
        UserError: for anything else; bad JSON is named with its line.
    """
    content = stream.read()
    try:
        parsed = _parse(content)
    except RowError as error:
        raise UserError(f"{name}: {error}") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return read_jsonl(io.BytesIO(content), name, bad)
        raise UserError(f"{name}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from error
    if isinstance(parsed, dict) and isinstance(parsed.get("data"), list):
        parsed = parsed["data"]
    if isinstance(parsed, dict):
        parsed = [parsed]
    if not isinstance(parsed, list):
        raise UserError(f'{name}: expected a list such as [{{"text": ...}}, ...], got {str(parsed)[:80]}')
    table = Table([])
    for number, row in enumerate(parsed, 1):
        if isinstance(row, dict):
            table.add(row, f"{name}, row {number}")
        else:
            bad.add(f"{name}, row {number}", RowError("no object", f"{NO_OBJECT}{str(row)[:80]}"))
    return table


def read_jsonl(stream: IO[bytes], name: str, bad: BadRows) -> Table:
    """Read one JSON object a line; empty lines do not count."""
    table = Table([])
    for number, line in enumerate(stream, 1):
        if line.strip():
            with bad.collecting(f"{name}, line {number}"):
                table.add(_object(line), f"{name}, line {number}")
    return table


def _object(line: bytes) -> Row:
    try:
        row = _parse(line)
    except json.JSONDecodeError as error:
        raise RowError(
            "not valid JSON",
            f"not valid JSON: {error.msg} at column {error.colno}: {line[:80].decode(errors='replace').strip()}",
        ) from error
    except UnicodeDecodeError as error:
        raise RowError("not UTF-8 text", f"not UTF-8 text: byte {line[error.start]:#04x}; {LATIN}") from error
    if not isinstance(row, dict):
        raise RowError("no object", f"{NO_OBJECT}{str(row)[:80]}")
    return row
