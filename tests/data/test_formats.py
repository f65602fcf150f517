"""Every format: what a row says, what is learnt, and what a wrong row is told."""

from typing import Any

import pytest

from glora_llm.data.formats import FORMATS, Message, check_settings
from glora_llm.errors import UserError
from tests.data.conftest import Settings


def segments(name: str, row: dict[str, Any], settings: Any) -> tuple[str, str]:
    example = FORMATS.get(name)(row, settings)
    prompt, answer = example.segments
    assert (prompt.is_target, answer.is_target) == (False, True)
    return prompt.text, answer.text


def test_alpaca_uses_the_published_prompts(settings: Settings) -> None:
    row = {"instruction": "Add.", "input": "2, 3", "output": "5"}
    prompt, answer = segments("alpaca", row, settings(format="alpaca"))
    assert prompt.startswith("Below is an instruction that describes a task, paired with an input that provides")
    assert prompt.endswith("\n\n### Instruction:\nAdd.\n\n### Input:\n2, 3\n\n### Response:")
    assert answer == "5"
    prompt, _ = segments("alpaca", {**row, "input": None}, settings(format="alpaca"))
    assert "### Input" not in prompt and prompt.startswith("Below is an instruction that describes a task. Write")


def test_braces_of_the_data_are_text(settings: Settings) -> None:
    row = {"instruction": "Print {x} {0}", "input": "", "output": "{y}"}
    prompt, answer = segments("alpaca", row, settings(format="alpaca"))
    assert "Print {x} {0}" in prompt and answer == "{y}"


def test_prompt_completion(settings: Settings) -> None:
    row = {"prompt": "Q: who?", "completion": " me"}
    assert segments("prompt_completion", row, settings(format="prompt_completion")) == ("Q: who?", " me")


def test_a_space_before_the_answer_belongs_to_the_answer(settings: Settings) -> None:
    chosen = settings(format="prompt_completion", prompt="Q: {question}\nA: ", columns={"completion": "answer"})
    assert segments("prompt_completion", {"question": "1+1", "answer": 2}, chosen) == ("Q: 1+1\nA:", " 2")


def test_text(settings: Settings) -> None:
    (segment,) = FORMATS.get("text")({"body": "abc"}, settings(columns={"text": "body"})).segments
    assert (segment.text, segment.is_target) == ("abc", True)


@pytest.mark.parametrize(
    ("label", "labels", "word"),
    [
        (1, ["no", "yes"], " yes"),
        ("1", ["no", "yes"], " yes"),
        (True, ["no", "yes"], " yes"),
        (1.0, ["no", "yes"], " yes"),
        ("yes", ["no", "yes"], " yes"),
        ("card_arrival", None, " card arrival"),
        ("card_arrival", ["card arrival", "lost card"], " card arrival"),
        ("card_arrival", ["card_arrival"], " card_arrival"),
        ("5", None, " 5"),
        ("already two_words", None, " already two_words"),
    ],
)
def test_labels_become_words(label: Any, labels: list[str] | None, word: str, settings: Settings) -> None:
    chosen = settings(format="classification", labels=labels)
    assert segments("classification", {"text": "hm", "label": label}, chosen) == ("hm\nLabel:", word)


@pytest.mark.parametrize(
    ("label", "labels", "told"),
    [
        (2, ["no", "yes"], "numbers 0 to 1"),
        (-1, ["no", "yes"], "withheld"),
        (1, None, "data.labels"),
        ("yess", ["no", "yes"], "Did you mean 'yes'"),
        (None, ["no", "yes"], "class number or a word"),
        ("", None, "class number or a word"),
        (0.5, ["no", "yes"], "class number or a word"),
        ([1], ["no", "yes"], "class number or a word"),
    ],
)
def test_wrong_labels(label: Any, labels: list[str] | None, told: str, settings: Settings) -> None:
    with pytest.raises(UserError, match=told):
        FORMATS.get("classification")({"text": "hm", "label": label}, settings(format="classification", labels=labels))


def test_a_template_over_several_columns(settings: Settings) -> None:
    chosen = settings(
        format="classification", prompt="{sentence1} {second}\nSame: ", labels=["no", "yes"],
        columns={"second": "sentence2", "label": "same"},
    )  # fmt: skip
    check_settings(chosen)
    row = {"sentence1": "a", "sentence2": "b", "same": 0}
    assert segments("classification", row, chosen) == ("a b\nSame:", " no")


OPENAI = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello", "weight": 0},
    {"role": "user", "content": [{"type": "text", "text": "and "}, {"type": "text", "text": "you?"}]},
    {"role": "assistant", "content": "fine", "weight": None},
]


def test_openai_messages(settings: Settings) -> None:
    example = FORMATS.get("chat")({"messages": OPENAI}, settings(format="chat"))
    assert example.messages[3:] == (Message("user", "and you?", False), Message("assistant", "fine", True))
    assert example.targets() == ["fine"]


def test_sharegpt_conversations(settings: Settings) -> None:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    for row, columns in (({"conversations": turns}, None), ({"talk": turns}, {"conversations": "talk"})):
        example = FORMATS.get("chat")(row, settings(format="chat", columns=columns))
        assert [m.role for m in example.messages] == ["system", "user", "assistant"]
        assert example.targets() == ["a"]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"mesages": []}, "no column 'messages'.*Did you mean 'mesages'"),
        ({"messages": "hi"}, "list of turns"),
        ({"messages": []}, "list of turns"),
        ({"messages": [{"role": "user"}]}, "ShareGPT"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "Did you mean 'assistant'"),
        ({"messages": [{"role": "assistant", "content": None}]}, "should be text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "should be text"),
    ],
)
def test_wrong_conversations(row: dict[str, Any], told: str, settings: Settings) -> None:
    with pytest.raises(UserError, match=told):
        FORMATS.get("chat")(row, settings(format="chat"))


def test_a_missing_column_lists_those_there_are(settings: Settings) -> None:
    with pytest.raises(UserError, match=r"no column 'output'; the columns are: instruction, input, ouput.*'ouput'"):
        FORMATS.get("alpaca")({"instruction": "a", "input": "", "ouput": "b"}, settings(format="alpaca"))


def test_a_column_of_another_type(settings: Settings) -> None:
    with pytest.raises(UserError, match="should hold a text and holds a list"):
        FORMATS.get("text")({"text": ["a"]}, settings())


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"format": "alpcaa"}, "Did you mean 'alpaca'"),
        ({"format": "alpaca", "prompt": "{x}"}, "data.prompt does not go with format alpaca"),
        ({"format": "chat", "labels": ["a"]}, "data.labels does not go"),
        ({"format": "chat", "overlong": "split"}, "overlong=split"),
        ({"format": "text", "chat_template": "tokenizer"}, "chat_template"),
        ({"format": "classification", "overlong": "truncate"}, "cut off the label"),
        ({"format": "classification", "labels": ["a", "a"]}, "twice"),
        ({"format": "alpaca", "system": "Be brief."}, "data.system needs a conversation"),
        ({"format": "alpaca", "columns": {"instuction": "q"}}, "Did you mean 'instruction'"),
        ({"format": "classification", "columns": {"sentence1": "q"}}, "names the role 'sentence1'"),
        ({"format": "classification", "prompt": "{text"}, "expected '}'"),
        ({"format": "classification", "prompt": "{}"}, "not the name of a column"),
        ({"format": "classification", "prompt": "{text.real}"}, "not the name of a column"),
        ({"format": "classification", "prompt": "{text!r}"}, "not the name of a column"),
        ({"format": "classification", "prompt": "Mood:"}, "names no column"),
    ],
)
def test_settings_that_do_not_fit(keys: dict[str, Any], told: str, settings: Settings) -> None:
    with pytest.raises(UserError, match=told):
        check_settings(settings(**keys))


def test_settings_that_fit(settings: Settings) -> None:
    names = FORMATS.names()
    assert len(names) >= 5
    for name in names:
        check_settings(settings(format=name))
