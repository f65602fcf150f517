"""The word that stands for a class in a text."""

import math
from functools import lru_cache
from typing import Any

from glora_llm.data.bad_rows import RowError
from glora_llm.data.columns import whole
from glora_llm.errors import nearest


def readable(name: str) -> str:
    """Return a label such as `card_payment_fee_charged` as words; a label with spaces of its own stays as it is."""
    return name if " " in name else name.replace("_", " ").strip()


def label_word(label: Any, words: list[str] | None) -> str:
    """Return the word that stands for `label` in the text.

    Args:
        label: a class number, a number in digits, or a name.
        words: the word of each class number; none: only names can be read.

    Raises:
        RowError: for a number without a word, a number outside `words`, and a name that is not among them.
    """
    is_digits = isinstance(label, str) and label.removeprefix("-").isdecimal()
    if isinstance(label, str) and label.strip() and (words is None or not is_digits or label in words):
        known = [w for w in (whole(label), readable(label)) if words is None or w in words]
        if known:
            return known[-1] if words is None else known[0]
        raise RowError(
            "a label that is not among the labels",
            f"Label '{label}' is not among the labels: {', '.join(words or [])}.{_nearest(label, *words or [])}",
        )
    is_whole = isinstance(label, int) or (isinstance(label, float) and label.is_integer())
    if not is_digits and not is_whole:
        raise RowError("no label", f"A label should be a class number or a word, and is {label!r}")
    if words is None:
        raise RowError(
            "a class number without a word",
            f"Label {label!r} is a number without a word; list the words by number: data.labels=[no,yes]",
        )
    number = int(label)
    if not 0 <= number < len(words):
        hint = " -1 marks rows whose labels are withheld: score on another split." if number == -1 else ""
        raise RowError(
            "a class number without a word",
            f"Class number {number} has no word: data.labels has numbers 0 to {len(words) - 1}.{hint}",
        )
    return words[number]


@lru_cache(4096)  # the same wrong label may stand in a million records
def _nearest(label: str, *words: str) -> str:
    return nearest(label, words)


def label_number(label: Any) -> float:
    """Return the label of a regression.

    Raises:
        RowError: for what is no finite number.
    """
    try:
        number = math.nan if isinstance(label, bool) else float(label)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError("a label that is no number", f"The label of a regression should be a number, and is {label!r}")
    return number
