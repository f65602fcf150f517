"""The final answer of a worked solution: the number behind `####` or `answer is`, else the last number.

Written after the answer parsing of PEFT's MetaMathQA benchmark (commas, `$` and `%` stand for nothing, fractions are
divided) and lm-eval's gsm8k (`####` first; else the last number of the text).
"""

import re

from glora_llm.errors import UserError

MARKS = re.compile(r"####|\banswer\s+is\b:?", re.IGNORECASE)
DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
# A minus is a sign where no number, word or bracket ends before it: 7-4 holds 7 and 4.
NUMBER = re.compile(rf"((?<![\w.)\]])[-\u2212])?\s?\$?\s?({DIGITS})(?:\s?/\s?({DIGITS}))?")
LETTER = re.compile(r"\(?([A-E])\)?[.!]?")
LETTERS = re.compile(r"(?<![A-Za-z])[A-E](?![A-Za-z])")


def final_number(text: str) -> float | None:
    """Return the final number of a text; None where it holds none, or divides by zero."""
    marks = list(MARKS.finditer(text))
    behind = NUMBER.search(text, marks[-1].end()) if marks else None
    found = behind or next(iter(reversed(list(NUMBER.finditer(text)))), None)
    if found is None:
        return None
    sign, above, below = found.groups()
    value = float(above.replace(",", ""))
    if below is not None:
        divisor = float(below.replace(",", ""))
        if divisor == 0:
            return None
        value /= divisor
    return -value if sign else value


def final_letter(text: str) -> str | None:
    """Return the final letter from A to E that stands alone, behind `answer is` where that is there; else None."""
    marks = list(MARKS.finditer(text))
    behind = LETTERS.search(text, marks[-1].end()) if marks else None
    found = behind or next(iter(reversed(list(LETTERS.finditer(text)))), None)
    return found[0] if found else None


def same_answer(reference: str, generated: str) -> bool:
    """Tell whether a generated text ends with the final answer of the reference: its number, or its letter (AQuA)."""
    letter = LETTER.fullmatch(reference.strip())
    if letter:
        return final_letter(generated) == letter[1]
    number = final_number(reference)
    return number is not None and final_number(generated) == number


def has_answer(reference: str) -> bool:
    """Tell whether a reference ends with a number, or is a letter from A to E."""
    return LETTER.fullmatch(reference.strip()) is not None or final_number(reference) is not None


def require_answers(name: str, references: list[str]) -> None:
    """Check that every reference has a final answer.

    Raises:
        UserError: listing the first ten that have none.
    """
    without = [reference for reference in references if not has_answer(reference)]
    if without:
        shown = "".join(f"\n  {reference[:120]!r}" for reference in without[:10])
        first = f"; the first {min(10, len(without))}" if len(without) > 1 else ""
        raise UserError(
            f"{len(without)} of {len(references)} {name} answers hold no number{first}:{shown}\n"
            "evaluation.generate scores the final number of an answer (or a letter from A to E). Mend them, take them "
            "out, or set evaluation.generate.score=none: texts are then written and not scored."
        )
