"""JSON files that people edit or programs leave behind: every way of being wrong is one message that names the file."""

import json
from pathlib import Path
from typing import Any

from glora_llm.errors import UserError


def read_object(file: Path, advice: str) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Args:
        advice: what to do about a file that is wrong, a sentence.

    Raises:
        UserError: when it cannot be read, is no JSON, nests too deep, or holds no object.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as text: {error}. {advice}") from error
    value = parse(text, str(file), advice)
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a {type(value).__name__}; expected a JSON object, {{...}}. {advice}")
    return value


def parse(text: str, name: str, advice: str) -> Any:
    """Return what JSON text says; a key that stands twice in one object is an error, for the last would win unseen.

    Args:
        name: of the text, for messages.
        advice: what to do about text that is wrong, a sentence.

    Raises:
        UserError: when it is no JSON, nests too deep, or holds a number of too many digits or a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise UserError(f"{name} is not valid JSON: its brackets nest too deep. {advice}") from error
    except ValueError as error:  # also more digits than int() takes
        raise UserError(f"{name} is not valid JSON: {error}. {advice}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' stands there twice")
    return found
