"""Columns of a row by the role they play in a format, and templates over columns."""

import math
import string
from collections.abc import Sequence
from typing import Any

from glora_llm.data.bad_rows import RowError
from glora_llm.errors import UserError, nearest
from glora_llm.schema import DataSection

Row = dict[str, Any]


def column_of(row: Row, role: str, settings: DataSection) -> str:
    """Return the name of the column that plays `role` in a row.

    `query|question` names two, of sets that call it differently: the first that the row has counts.
    """
    name = (settings.columns or {}).get(role, role)
    return next((one for one in name.split("|") if one in row), name)


def value(row: Row, role: str, settings: DataSection) -> Any:
    """Return the column of `row` that plays `role`: the one that data.columns names, else the one of that name.

    Raises:
        RowError: when the row has no such column; the message lists those that it has.
    """
    name = column_of(row, role, settings)
    if name in row:
        return row[name]
    wanted = f"'{name}'" if name == role else f"'{name}' (data.columns names it for '{role}')"
    raise RowError(
        f"no column '{name}'",
        f"There is no column {wanted}; the columns are: {', '.join(map(str, row)) or 'none'}."
        f"{nearest(name, map(str, row))} Name the right one with data.columns: {{{role}: COLUMN}}.",
    )


def text(row: Row, role: str, settings: DataSection) -> str:
    """Return the column that plays `role` as text.

    Raises:
        RowError: when there is no such column, or it holds neither a text nor a finite number.
    """
    content = value(row, role, settings)
    name = column_of(row, role, settings)
    if isinstance(content, float) and not math.isfinite(content):
        raise RowError(f"{content} in column '{name}'", f"Column '{name}' should hold a text and holds {content}")
    if content is None:
        raise RowError(f"null in column '{name}'", f"Column '{name}' should hold a text and holds null")
    if not isinstance(content, str | int | float):
        kind = type(content).__name__
        raise RowError(
            f"a {kind} in column '{name}'",
            f"Column '{name}' should hold a text and holds a {kind}: {str(content)[:80]}",
        )
    return whole(str(content))


def answer(row: Row, role: str, settings: DataSection) -> str:
    """Return the column that plays `role`, and is learnt, as text; null is a blank answer.

    Raises:
        RowError: as `text`.
    """
    return "" if value(row, role, settings) is None else text(row, role, settings)


def whole(content: str) -> str:
    """Return the text, after checking that it can be written as UTF-8.

    Raises:
        RowError: for half of a surrogate pair, as a cut-off emoji in JSON leaves it.
    """
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            "half of a surrogate pair",
            f"character {error.start + 1} is half of a surrogate pair, which is no character: "
            f"{content[max(0, error.start - 30) : error.start + 10]!a}",
        ) from error
    return content


def check_columns(rows: Sequence[Row], settings: DataSection) -> None:
    """Check that every column that data.columns names is there in some row: `input` of alpaca may be left out.

    Raises:
        UserError: naming the role, the column and the columns that there are.
    """
    for role, column in (settings.columns or {}).items():
        if rows and not any(column_of(row, role, settings) in row for row in rows):
            there = list(dict.fromkeys(str(name) for row in rows[:1000] for name in row))
            raise UserError(
                f"data.columns names the column '{column}' for '{role}', and no training row has it; the columns are: "
                f"{', '.join(there)}.{nearest(column, there)}"
            )


def template_fields(template: str) -> list[str]:
    """Return the names between braces in a template such as `{sentence1} {sentence2}`.

    Raises:
        UserError: when the braces do not pair up, a field is not a plain name, or there is no field at all.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"data.prompt {template!r}: {error}; write a brace of the text itself twice: {{{{") from error
    names = [name for _, name, spec, conversion in parsed if name is not None]
    odd = [name for _, name, spec, conversion in parsed if name is not None and (spec or conversion or name == "")]
    odd += [name for name in names if set(name) & set(".[]")]
    if odd:
        raise UserError(
            f"data.prompt {template!r}: '{{{odd[0]}}}' is not the name of a column; write {{NAME}}, "
            "and a brace of the text itself twice: {{"
        )
    if not names:
        raise UserError(
            f"data.prompt {template!r} names no column, so every row would read the same; write one as {{text}}"
        )
    return names


def fill(template: str, row: Row, settings: DataSection) -> str:
    """Return the template with every `{role}` replaced by that column's text.

    Raises:
        UserError: as `template_fields` and `text`.
    """
    return template.format(**{name: text(row, name, settings) for name in template_fields(template)})
