"""Guess the data format of records from their columns, and how many characters a sample has."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from glora_llm.data.columns import Row
from glora_llm.data.formats import FORMATS, Example
from glora_llm.errors import UserError
from glora_llm.schema import DataSection

TURNS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
PROMPTS = ("prompt", "question", "query", "input", "source", "problem", "title")
ANSWERS = ("completion", "output", "response", "answer", "target", "reply", "solution", "summary")
CONTEXTS = ("input", "context")
LABELS = ("label", "labels", "category", "class", "intent", "sentiment", "topic", "target", "tag")
TEXTS = ("text", "content", "body", "document", "sentence")
MOST_LABELS = 200  # more different values are no classes
LOOKED_AT = 2000  # records: enough for lengths and labels


@dataclass(frozen=True)
class Detected:
    """A data format and the keys of the recipe's data section that make records fit it.

    Args:
        format: a name of `data.formats`.
        reason: the columns that decided it, for the user.
        columns: data.columns: role -> column, where they differ.
        prompt: data.prompt, where the format needs one.
        labels: data.labels, of class numbers without names.
    """

    format: str
    reason: str
    columns: dict[str, str] | None = None
    prompt: str | None = None
    labels: list[str] | None = None

    def section(self, source: str) -> DataSection:
        """Return a data section with these keys; its other keys have their defaults."""
        return DataSection(
            format=self.format, source=source, columns=self.columns, prompt=self.prompt, labels=self.labels,
            max_tokens=2,
        )  # fmt: skip


def detect(rows: Sequence[Row], label_names: dict[str, list[str]], task: str | None = None) -> Detected:
    """Return the data format that fits the columns of the records.

    Args:
        rows: at least one record.
        label_names: column -> names of its class numbers, where the file states them.
        task: the format that the user asked for; None: the first that fits, in the order chat, alpaca,
            prompt_completion, classification, text.

    Raises:
        UserError: when none fits, or the one asked for does not; the message lists the columns.
    """
    sample = rows[:: max(1, len(rows) // LOOKED_AT)][:LOOKED_AT]
    names = list(dict.fromkeys(str(name) for row in sample for name in row))
    for form, find in FINDERS.items():
        if task in (None, form):
            found = find(sample, names, label_names)
            if found:
                return found
    FORMATS.get(task or "chat")  # an unknown name: the error names the nearest
    wanted = task or "any of " + ", ".join(FINDERS)
    raise UserError(
        f"The columns {', '.join(names)} do not look like {wanted}. Rename the columns (prompt and completion, or text "
        "and label, say), or copy the minimal recipe of docs/getting_started.md and set data.format and data.columns."
    )


def _chat(rows: Sequence[Row], names: Sequence[str], _: dict[str, list[str]]) -> Detected | None:
    for name in [*(n for n in TURNS if n in names), *names]:
        turns = next((row[name] for row in rows if row.get(name)), None)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            known = name in ("messages", "conversations")
            return Detected("chat", f"the column {name} holds turns", None if known else {"messages": name})
    return None


def _alpaca(rows: Sequence[Row], names: Sequence[str], _: dict[str, list[str]]) -> Detected | None:
    answer = _first(ANSWERS, names, rows)
    if "instruction" not in names or answer is None:
        return None
    renamed = {} if answer == "output" else {"output": answer}
    context = _first(CONTEXTS, names, rows)
    if context not in (None, "input"):
        renamed["input"] = str(context)
    return Detected("alpaca", f"columns instruction and {answer}", renamed or None)


def _prompt_completion(rows: Sequence[Row], names: Sequence[str], _: dict[str, list[str]]) -> Detected | None:
    prompt, answer = _first(PROMPTS, names, rows), _first(ANSWERS, names, rows)
    if prompt is None or answer is None or prompt == answer:
        return None
    ends_in_space = all(str(row.get(prompt) or " ")[-1].isspace() for row in rows)
    template = None if prompt == "prompt" and ends_in_space else f"{{{prompt}}}\n"
    if prompt in ("question", "problem"):
        template = f"Question: {{{prompt}}}\nAnswer: "
    renamed = None if answer == "completion" else {"completion": answer}
    return Detected("prompt_completion", f"columns {prompt} and {answer}", renamed, template)


def _classification(rows: Sequence[Row], names: Sequence[str], named: dict[str, list[str]]) -> Detected | None:
    label = _first(LABELS, names, ())
    texts = [name for name in names if name != label and _is_text(rows, name)]
    if label is None or not texts:
        return None
    values = {row[label] for row in rows if isinstance(row.get(label), str | int) and row[label] != ""}
    if not 1 < len(values) <= min(MOST_LABELS, max(2, len(rows) // 2)):
        return None
    labels = None
    if label not in named and all(str(value).isdecimal() for value in values):
        labels = [str(number) for number in range(max(int(value) for value in values) + 1)]
    chosen = [name for name in texts if name in TEXTS][:1] or texts
    prompt = "".join(f"{{{name}}}\n" for name in chosen) + "Label:"
    renamed = None if label == "label" else {"label": label}
    reason = f"column {label} with {len(values)} different values"
    return Detected("classification", reason, renamed, None if chosen == ["text"] else prompt, labels)


def _text(rows: Sequence[Row], names: Sequence[str], _: dict[str, list[str]]) -> Detected | None:
    texts = [name for name in names if _is_text(rows, name)]
    found = next((name for name in TEXTS if name in texts), texts[0] if len(texts) == 1 else None)
    if found is None:
        return None
    return Detected("text", f"running text in column {found}", None if found == "text" else {"text": found})


FINDERS = {
    "chat": _chat,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "classification": _classification,
    "text": _text,
}


def _first(wanted: Iterable[str], names: Sequence[str], rows: Sequence[Row]) -> str | None:
    """Return the first of the wanted columns that is there, and holds text where records are given."""
    return next((name for name in wanted if name in names and (not rows or _is_text(rows, name))), None)


def _is_text(rows: Sequence[Row], name: str) -> bool:
    values: list[Any] = [row.get(name) for row in rows]
    return all(isinstance(value, str | int | float | None) for value in values) and any(
        isinstance(value, str) and value.strip() for value in values
    )


def examples(
    rows: Sequence[Row], found: Detected, label_names: dict[str, list[str]]
) -> tuple[list[Example], str | None]:
    """Return an evenly spaced choice of the records as examples, and the error of the first that is none."""
    if found.format == "classification" and found.labels is None:
        column = (found.columns or {}).get("label", "label")
        found = replace(found, labels=label_names.get(column))
    settings, to_example = found.section("records"), FORMATS.get(found.format)
    made, problem = [], None
    for row in rows[:: max(1, len(rows) // LOOKED_AT)][:LOOKED_AT]:
        try:
            made.append(to_example(row, settings))
        except UserError as error:
            problem = problem or str(error)
    return made, problem
