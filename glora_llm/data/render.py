"""Example -> one text and the spans of it that are to be learnt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glora_llm.data.bad_rows import RowError
from glora_llm.data.formats import Example, Message
from glora_llm.errors import UserError
from glora_llm.schema import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rendered:
    """A sample's text.

    Attributes:
        spans: [start, end) of each target, in characters.
        add_end: whether the end token still has to be appended, as a target.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    add_end: bool


def render(example: Example, tokenizer: "PreTrainedTokenizerBase", settings: DataSection) -> Rendered:
    """Return the text of an example and the spans of its answers.

    Raises:
        UserError: when the chat template is missing.
        RowError: when it refuses the conversation, or is not prefix consistent.
    """
    if example.segments and settings.chat_template != "tokenizer":
        return _join_segments(example)
    messages = with_system(as_messages(example), settings.system)
    if settings.chat_template == "none":
        return _plain_chat(messages, tokenizer)
    return _template_chat(messages, tokenizer)


def as_messages(example: Example) -> tuple[Message, ...]:
    """Return the conversation of an example; prompt and answer become a turn of the user and one of the assistant."""
    if example.messages:
        return example.messages
    prompt = "".join(s.text for s in example.segments if not s.is_target).strip()
    answer = "".join(s.text for s in example.segments if s.is_target).strip()
    return (Message("user", prompt, False), Message("assistant", answer, True))


def with_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """Return the conversation with the message `system` in front, unless it has a system message of its own."""
    if system is None or messages[0].role == "system":
        return messages
    return (Message("system", system, False), *messages)


def _join_segments(example: Example) -> Rendered:
    text, spans = "", []
    for segment in example.segments:
        if segment.is_target:
            spans.append((len(text), len(text) + len(segment.text)))
        text += segment.text
    return Rendered(text, tuple(spans), add_end=True)


def _plain_chat(messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase") -> Rendered:
    """`User: ...`, `Assistant: ...`, one turn a line; the assistant's end with the end token."""
    text, spans = "", []
    for message in messages:
        text += ("\n" if text else "") + f"{message.role.capitalize()}:"
        start = len(text)
        text += f" {message.content}" + (str(tokenizer.eos_token or "") if message.role == "assistant" else "")
        if message.is_target:
            spans.append((start, len(text)))
    return Rendered(text, tuple(spans), add_end=False)


def _template_chat(messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase") -> Rendered:
    """Render with the tokenizer's template; each answer is what its turn adds to the text before it."""
    text = _apply(tokenizer, messages, opens_answer=False)
    spans = []
    for n, message in enumerate(messages):
        if not message.is_target:
            continue
        if n == 0:
            raise RowError(
                "a conversation that begins with the assistant",
                "the conversation begins with the assistant, so there is no prompt to answer: put a turn of the user "
                "before it, or set data.system.",
            )
        before = _apply(tokenizer, messages[:n], opens_answer=True)
        upto = text if n + 1 == len(messages) else _apply(tokenizer, messages[: n + 1], opens_answer=False)
        for part in (before, upto):
            _check_prefix(part, text, n)
        if len(upto) < len(before):
            _check_prefix(before, upto, n)
        spans.append((len(before), len(before) + len(upto[len(before) :].rstrip())))
    return Rendered(text, tuple(spans), add_end=False)


def _apply(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], opens_answer: bool) -> str:
    import jinja2

    if not tokenizer.chat_template:
        raise UserError(
            "The tokenizer has no chat template: set data.chat_template=none for plain 'User: ... Assistant: ...' "
            "turns, or use the tokenizer of a chat model."
        )
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        rendered = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=opens_answer, return_dict=False
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise RowError(
            "refused by the chat template",
            f"the chat template refuses this conversation ({roles}): {error}. Mend the row, or set "
            "data.chat_template=none.",
        ) from error
    return str(rendered)


def _check_prefix(part: str, text: str, turn: int) -> None:
    if text.startswith(part):
        return
    at = next((n for n, (a, b) in enumerate(zip(part, text, strict=False)) if a != b), min(len(part), len(text)))
    start = max(0, at - 30)
    raise RowError(
        "a beginning that the chat template writes in two ways",
        f"the chat template writes the conversation up to turn {turn + 1} differently once more turns "
        f"follow, so the answer cannot be found in it. At character {at}: {part[start : at + 40]!r} alone, "
        f"{text[start : at + 40]!r} in the whole. Keep one answer a conversation, or set data.chat_template=none.",
    )
