"""Multiple choice: a record with options of its own. Its right option is learnt; of held-out records all are scored."""

import re
from typing import Any

from glora_llm.data.bad_rows import RowError
from glora_llm.data.columns import Row, fill, text, value, whole
from glora_llm.data.formats import Example, Options, Segment, data_format
from glora_llm.schema import DataSection

QUESTION_PROMPT = "Question: {question}\nAnswer:"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BLANK = "_"


@data_format(
    "multiple_choice", roles=("options", "answer", "blank"), template=QUESTION_PROMPT, takes_template=True
)  # fmt: skip
def multiple_choice(row: Row, settings: DataSection) -> Example:
    """data.prompt filled, then a space and the right option, which is learnt (no space after a line break).

    Where data.columns names a `blank`, its text up to `_` and the option are the prompt, and what follows is learnt
    (partial evaluation, Trinh and Le 2018, as WinoGrande is scored).
    """
    row = CLEANED[settings.benchmark](row) if settings.benchmark in CLEANED else row
    texts, names = _options(row, settings)
    right = right_option(value(row, "answer", settings), texts, names)
    if "blank" in (settings.columns or {}):
        segments = _cloze(text(row, "blank", settings), texts)
    else:
        prompt = fill(settings.prompt or QUESTION_PROMPT, row, settings).rstrip(" ")
        space = "" if prompt.endswith("\n") else " "
        segments = tuple((Segment(prompt, False), Segment(space + option, True)) for option in texts)
    return Example(segments=segments[right], options=Options(segments, tuple(map(len, texts)), right))


def clean_wikihow(row: Row) -> Row:
    """Return a record of HellaSwag without the marks of WikiHow's pages, as lm-eval words it.

    The columns `activity_label`, `ctx` and `endings` are used; where `ctx_a` and `ctx_b` are there, `ctx` is made of
    them, with a capital at the begin of the second.
    """
    made = dict(row)
    if isinstance(row.get("ctx_a"), str) and isinstance(row.get("ctx_b"), str):
        made["ctx"] = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    if isinstance(made.get("ctx"), str) and isinstance(row.get("activity_label"), str):
        cleaned = _without_marks(f"{row['activity_label']}: {made['ctx']}")  # as one: the prompt joins them again
        made["activity_label"], _, made["ctx"] = cleaned.partition(": ")
    if isinstance(row.get("endings"), list):
        made["endings"] = [_without_marks(one) if isinstance(one, str) else one for one in row["endings"]]
    return made


def _without_marks(content: str) -> str:
    return re.sub(r"\[.*?\]", "", content.strip().replace(" [title]", ". ")).replace("  ", " ")


CLEANED = {"hellaswag": clean_wikihow}  # data.benchmark -> what is done to its records first


def _cloze(sentence: str, texts: list[str]) -> tuple[tuple[Segment, ...], ...]:
    before, blank, after = sentence.partition(BLANK)
    if not blank or not after.strip():
        raise RowError(
            "no blank with text after it",
            f"The sentence should hold {BLANK} where the options go, and text after it, and is: {sentence[:120]}",
        )
    return tuple((Segment(before + option, False), Segment(f" {after.strip()}", True)) for option in texts)


def _options(row: Row, settings: DataSection) -> tuple[list[str], list[str]]:
    """Return the options of a record, and their names where it or data.labels gives them.

    Raises:
        RowError: for fewer than two options, and for one that is empty or no text.
    """
    if settings.options:
        found: Any = [value(row, name, settings.model_copy(update={"columns": None})) for name in settings.options]
    else:
        found = value(row, "options", settings)
    names: list[str] = list(settings.labels or [])
    if isinstance(found, dict) and isinstance(found.get("text"), list):  # ARC, OpenBookQA
        stated = found.get("label")
        names = [str(name).strip() for name in stated] if isinstance(stated, list) else names
        found = found["text"]
    if not isinstance(found, list):
        raise RowError(
            "options that are no list",
            f"The options should be a list of texts, or {{text: [...], label: [...]}}, and are: {str(found)[:120]} "
            "(or name their columns: data.options=[first,second])",
        )
    if len(found) < 2:
        raise RowError("fewer than two options", f"A choice needs two options or more, and there is: {found!r:.120}")
    texts = [_option(option, number) for number, option in enumerate(found, 1)]
    if names and len(names) < len(texts):
        raise RowError(
            "more options than names", f"There are {len(texts)} options and {len(names)} names: {', '.join(names)}"
        )
    return texts, names[: len(texts)]


def _option(option: Any, number: int) -> str:
    if isinstance(option, str) and option.strip():
        return whole(option.strip())
    if isinstance(option, int | float) and option == option:  # noqa: PLR0124 - not NaN
        return str(option)
    raise RowError("an empty option", f"Option {number} should be a text, and is {option!r:.80}")


def right_option(answer: Any, texts: list[str], names: list[str]) -> int:
    """Return the number of the right option, from 0.

    Args:
        answer: a name, where the options have names; else the number of an option from 0, its letter, or its text.
        names: of the options; none: they have none.

    Raises:
        RowError: when it is none of the options, or might be two of them.
    """
    is_number = isinstance(answer, int) or (isinstance(answer, float) and answer.is_integer())
    said = str(int(answer)) if is_number else answer.strip() if isinstance(answer, str) else ""
    if not said:
        raise RowError("options without an answer", f"There are options and no answer: {answer!r:.80}")
    if said in names:
        return names.index(said)
    if is_number and not names and 0 <= int(said) < len(texts):
        return int(said)
    found = {texts.index(said)} if said in texts else set()
    if not names and said.isdecimal():
        found |= {int(said)} & set(range(len(texts)))
    if not names and len(said) == 1:
        found |= {LETTERS.find(said)} & set(range(len(texts)))
    if len(found) == 1:
        return found.pop()
    if found:
        raise RowError(
            "an answer that may be two options",
            f"Answer '{said}' is the text of one option and the number or letter of another: "
            f"{', '.join(texts)[:200]}. Name the options by data.labels, or write answers as numbers from 0",
        )
    known = ", ".join(names or texts)
    raise RowError("an answer that is none of the options", f"Answer '{said[:80]}' is none of: {known[:200]}")
