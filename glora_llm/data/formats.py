"""Row -> Example: what a row says, and which parts of it are to be learnt. docs/data_formats.md shows each format.

To add a format, write one function here: `data_format` registers it, and names the columns that it reads.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from glora_llm.data.bad_rows import RowError
from glora_llm.data.columns import Row, answer, fill, template_fields, text, value, whole
from glora_llm.data.label_words import label_number, label_word
from glora_llm.errors import UserError, nearest
from glora_llm.registry import Registry
from glora_llm.schema import DataSection

CLASSIFICATION_PROMPT = "{text}\nLabel:"

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "system": "system", "developer": "developer", "tool": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; the targets are turns of the assistant."""

    role: str
    content: str
    is_target: bool


@dataclass(frozen=True)
class Segment:
    """A piece of text that stands in the sample as it is."""

    text: str
    is_target: bool


@dataclass(frozen=True)
class Options:
    """The options of a record of multiple choice.

    Attributes:
        segments: of each option, prompt and option as the segments of a sample.
        lengths: characters of each option.
        right: number of the right one, from 0.
    """

    segments: tuple[tuple[Segment, ...], ...]
    lengths: tuple[int, ...]
    right: int


@dataclass(frozen=True)
class Example:
    """One row: either messages (format chat) or segments (all others; the last of them is a target).

    Of multiple choice the segments are those of the right option. `origin` says where the row stands, for messages;
    `label` is what a head learns: the word of a class, or a number.
    """

    messages: tuple[Message, ...] = ()
    segments: tuple[Segment, ...] = ()
    options: Options | None = None
    origin: str = field(default="", compare=False)
    label: str | float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if bool(self.messages) == bool(self.segments):
            raise ValueError("an Example holds either messages or segments")
        if self.segments and not self.segments[-1].is_target:
            raise ValueError("the last segment of an Example is a target")

    def text(self) -> str:
        """Return everything the example says as one text: equal texts are duplicates."""
        return "".join(s.text for s in self.segments) or "\n".join(f"{m.role}: {m.content}" for m in self.messages)

    def targets(self) -> list[str]:
        """Return the texts to be learnt."""
        return [m.content for m in self.messages if m.is_target] + [s.text for s in self.segments if s.is_target]

    def class_name(self) -> str:
        """Return what is learnt, which of format classification is the label word."""
        return "".join(self.targets()).strip()


@dataclass(frozen=True)
class Format:
    """A function from a row to an Example, and the roles that its columns play.

    Args:
        roles: the roles; data.columns may rename these and no others.
        template: the template that is filled when data.prompt is not given; none: `prompt` is a column.
        takes_template: whether data.prompt may be given; its fields are roles too.
    """

    function: Callable[[Row, DataSection], Example]
    roles: tuple[str, ...]
    template: str | None = None
    takes_template: bool = False

    def __call__(self, row: Row, settings: DataSection) -> Example:
        """Return the example that a row is."""
        return self.function(row, settings)

    def roles_of(self, settings: DataSection) -> list[str]:
        """Return the roles that this recipe uses, those of its template included."""
        template = settings.prompt or self.template
        if not self.takes_template or template is None:
            return list(self.roles)
        return list(dict.fromkeys([*template_fields(template), *(r for r in self.roles if r != "prompt")]))


FORMATS: Registry[Format] = Registry("data format")


def data_format(
    name: str, roles: tuple[str, ...], template: str | None = None, takes_template: bool = False
) -> Callable[[Callable[[Row, DataSection], Example]], Callable[[Row, DataSection], Example]]:
    """Return a decorator that registers a function as the format `name`; the arguments are those of `Format`."""

    def store(function: Callable[[Row, DataSection], Example]) -> Callable[[Row, DataSection], Example]:
        FORMATS.register(name)(Format(function, roles, template, takes_template))
        return function

    return store


def prompt_and_answer(prompt: str, answer: str) -> Example:
    """Return prompt and answer as two segments; spaces at the end of the prompt move to the answer.

    Most tokenizers glue a space to the word after it, so a space before the answer has to be part of the answer.
    """
    bare = prompt.rstrip(" ")
    return Example(segments=(Segment(bare, False), Segment(prompt[len(bare) :] + answer, True)))


@data_format("alpaca", roles=("instruction", "input", "output"))
def alpaca(row: Row, settings: DataSection) -> Example:
    """Stanford Alpaca (Taori et al. 2023): the two published prompts, with and without an input; learns `output`."""
    given = {"instruction": text(row, "instruction", settings), "output": answer(row, "output", settings)}
    optional = (settings.columns or {}).get("input", "input")  # many files leave the column out
    given["input"] = answer(row, "input", settings) if optional in row else ""
    template = ALPACA_WITH_INPUT if given["input"] else ALPACA_WITHOUT_INPUT
    return prompt_and_answer(template.format(**given), given["output"])


@data_format("prompt_completion", roles=("prompt", "completion"), takes_template=True)
def prompt_completion(row: Row, settings: DataSection) -> Example:
    """The column `prompt`, or data.prompt filled, directly followed by `completion`, which is learnt."""
    prompt = fill(settings.prompt, row, settings) if settings.prompt else text(row, "prompt", settings)
    return prompt_and_answer(prompt, answer(row, "completion", settings))


@data_format("text", roles=("text",))
def plain_text(row: Row, settings: DataSection) -> Example:
    """The column `text`; every token is learnt."""
    return Example(segments=(Segment(answer(row, "text", settings), True),))


@data_format("classification", roles=("text", "label"), template=CLASSIFICATION_PROMPT, takes_template=True)
def classification(row: Row, settings: DataSection) -> Example:
    """data.prompt filled, then a space and the label word, which is learnt (no space after a line break)."""
    prompt = fill(settings.prompt or CLASSIFICATION_PROMPT, row, settings).rstrip(" ")
    word = label_word(value(row, "label", settings), settings.labels)
    answer = Segment(word if prompt.endswith("\n") else f" {word}", True)
    return Example(segments=(Segment(prompt, False), answer), label=word)


@data_format("regression", roles=("text", "label"), template="{text}", takes_template=True)
def regression(row: Row, settings: DataSection) -> Example:
    """data.prompt filled, and the column `label`, a number, which a head of one output learns."""
    prompt = fill(settings.prompt or "{text}", row, settings).rstrip(" ")
    number = label_number(value(row, "label", settings))
    return Example(segments=(Segment(prompt, False), Segment(f" {number:g}", True)), label=number)


@data_format("chat", roles=("messages", "conversations"))
def chat(row: Row, settings: DataSection) -> Example:
    """OpenAI `messages` or ShareGPT `conversations`; learns every turn of the assistant whose `weight` is not 0."""
    named = [role for role in ("messages", "conversations") if role in (settings.columns or {})]
    present = [role for role in ("messages", "conversations") if role in row]
    turns = value(row, (named or present or ["messages"])[0], settings)
    if not isinstance(turns, list) or not turns:
        raise RowError("no list of turns", f"A conversation should be a list of turns, and is: {str(turns)[:120]}")
    messages = tuple(_message(turn) for turn in turns)
    if not any(message.is_target for message in messages):
        roles = ", ".join(message.role for message in messages)
        raise RowError(
            "no turn of the assistant to learn",
            f"No turn of the assistant is to be learnt ({roles}): {str(turns)[:120]}",
        )
    return Example(messages=messages)


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict) or not ({"role", "content"} <= set(turn) or {"from", "value"} <= set(turn)):
        raise RowError(
            "a turn of another form",
            f"A turn should be {{role, content}} (OpenAI) or {{from, value}} (ShareGPT), and is: {str(turn)[:120]}",
        )
    is_openai = {"role", "content"} <= set(turn)
    name, content = (turn["role"], turn["content"]) if is_openai else (turn["from"], turn["value"])
    if not isinstance(name, str) or name not in ROLES:
        raise RowError(
            "an unknown role",
            f"Unknown role {str(name)[:80]!r} in a turn; there is: {', '.join(ROLES)}.{nearest(str(name), ROLES)}",
        )
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        reason = _why_no_text(turn, content)
        raise RowError(
            reason, f"The content of a turn should be text, and the {name}'s is ({reason}): {str(content)[:120]}"
        )
    role = ROLES[name]
    return Message(role, whole(content), is_target=role == "assistant" and turn.get("weight") != 0)


def _why_no_text(turn: dict[str, Any], content: Any) -> str:
    """Return what is there in place of the text of a turn, in few words."""
    if content is None:
        return "a turn that only calls tools" if turn.get("tool_calls") or turn.get("function_call") else "null"
    if isinstance(content, list):
        return "parts that are no text, such as images"
    return f"a {type(content).__name__}"


def check_settings(settings: DataSection) -> None:
    """Check what can be checked before any row is read.

    Raises:
        UserError: for a key that the format has no use for, an unknown role in data.columns, and a bad template.
    """
    known = [*FORMATS.names(), "images"]
    if settings.format not in known:
        raise UserError(
            f"Unknown data format '{settings.format}'; there is: {', '.join(known)}.{nearest(settings.format, known)}"
        )
    chosen = FORMATS.get(settings.format)
    is_choice, templates = (
        settings.format == "multiple_choice",
        "classification, regression, multiple_choice and prompt_completion",
    )
    has_labels = is_choice or settings.format == "classification"
    misplaced = [
        ("prompt", settings.prompt is not None and not chosen.takes_template, templates),
        ("labels", settings.labels is not None and not has_labels, "classification or multiple_choice"),
        ("options", settings.options is not None and not is_choice, "multiple_choice"),
        ("overlong=split", settings.overlong == "split" and settings.format != "text", "text; use drop or truncate"),
        ("chat_template=tokenizer", settings.chat_template == "tokenizer" and settings.format == "text", "the others"),
    ]
    for name, is_misplaced, owner in misplaced:
        if is_misplaced:
            raise UserError(f"data.{name} does not go with format {settings.format}: it belongs to format {owner}.")
    if (has_labels or settings.format == "regression") and settings.overlong == "truncate":
        what = "options, which stand" if is_choice else "label, which stands"
        raise UserError(f"data.overlong=truncate would cut off the {what} at the end: use error or drop.")
    if settings.options is not None and len(settings.options) < 2:
        raise UserError(f"data.options names {len(settings.options)} column, and a choice needs two or more.")
    if is_choice and settings.prompt is not None and "blank" in (settings.columns or {}):
        raise UserError("data.prompt and the column `blank` do not fit: the sentence with the blank is the prompt.")
    if settings.labels is not None and len(set(settings.labels)) != len(settings.labels):
        raise UserError(f"data.labels names a word twice: {', '.join(settings.labels)}")
    if settings.system is not None and settings.format != "chat" and settings.chat_template != "tokenizer":
        raise UserError(
            f"data.system needs a conversation, and format {settings.format} has none: set "
            "data.chat_template=tokenizer, or write the message into data.prompt."
        )
    roles = chosen.roles_of(settings)
    for role in settings.columns or {}:
        if role not in roles:
            raise UserError(
                f"data.columns names the role '{role}'; format {settings.format} has: {', '.join(roles)}."
                f"{nearest(role, roles)} Write data.columns as {{ROLE: COLUMN}}."
            )
