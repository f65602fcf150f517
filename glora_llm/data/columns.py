"""Columns of a row by the role they play in a format, and templates over columns."""

import string
from typing import Any

from glora_llm.errors import UserError, nearest
from glora_llm.schema import DataSection

Row = dict[str, Any]


def value(row: Row, role: str, settings: DataSection) -> Any:
    """Return the column of `row` that plays `role`: the one that data.columns names, else the one of that name.

    Raises:
        UserError: when the row has no such column; the message lists those that it has.
    """
    name = (settings.columns or {}).get(role, role)
    if name in row:
        return row[name]
    wanted = f"'{name}'" if name == role else f"'{name}' (data.columns names it for '{role}')"
    raise UserError(
        f"There is no column {wanted}; the columns are: {', '.join(map(str, row)) or 'none'}."
        f"{nearest(name, map(str, row))} Name the right one with data.columns: {{{role}: COLUMN}}."
    )


def text(row: Row, role: str, settings: DataSection) -> str:
    """Return the column that plays `role` as text; a missing value (null) is an empty text.

    Raises:
        UserError: when there is no such column, or it holds neither a text nor a number.
    """
    content = value(row, role, settings)
    if content is None:
        return ""
    if not isinstance(content, str | int | float):
        raise UserError(
            f"Column '{(settings.columns or {}).get(role, role)}' should hold a text and holds a "
            f"{type(content).__name__}: {str(content)[:80]}"
        )
    return str(content)


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
