"""Limits of a search as a user writes them."""

import re

from glora_llm.errors import UserError
from glora_llm.schema import SearchSection

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
NO_LIMIT = "unlimited"


def limits(settings: SearchSection) -> dict[str, float]:
    """Return text -> limit, in the order given (`0.5M` is 500,000); one that limits nothing where there is none.

    Raises:
        UserError: for something that is no number.
    """
    if settings.budget is None:
        return {NO_LIMIT: float("inf")}
    parts = settings.budget if isinstance(settings.budget, list) else str(settings.budget).split(",")
    found = {}
    for part in parts:
        found[part.strip()] = amount(part, "search.budget")
    return found


def amount(text: str, name: str) -> float:
    """Return the number that a user wrote with a unit: `0.5M` is 500,000.

    Args:
        name: of the key or option, for the message.

    Raises:
        UserError: for something that is no number.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?\d+)?)\s*([kKmMgG]?)\s*", text)
    if match is None:
        raise UserError(f"{name} '{text}' is no limit; expected something like 0.5M, 250k or 1000000.")
    return float(match[1]) * UNITS[match[2].lower()]
