"""Multiple choice: options, answers, what a wrong record is told, and the sequences of a held-out one."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glora_llm.data.bad_rows import RowError
from glora_llm.data.choices import right_option
from glora_llm.data.formats import FORMATS, Example, check_settings
from glora_llm.data.prepare import prepare
from glora_llm.errors import UserError
from tests.data.conftest import Settings, write_rows

ARC = {"question": "What is card?", "choices": {"text": ["money", "fox", "dog"], "label": ["1", "2", "3"]}}


def made(row: dict[str, Any], settings: Settings, **keys: Any) -> Example:
    chosen = settings(format="multiple_choice", **keys)
    check_settings(chosen)
    return FORMATS.get("multiple_choice")(row, chosen)


def options_of(example: Example) -> list[tuple[str, str]]:
    assert example.options is not None
    assert example.segments == example.options.segments[example.options.right]
    return [(prompt.text, option.text) for prompt, option in example.options.segments]


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"question": "q", "options": ["a b", "c d"], "answer": 1}, {}),
        ({"question": "q", "options": ["a b", "c d"], "answer": "1"}, {}),
        ({"question": "q", "options": ["a b", "c d"], "answer": "B"}, {}),
        ({"question": "q", "options": ["a b", "c d"], "answer": "c d"}, {}),
        ({"question": "q", "options": ["a b", "c d"], "answer": 2.0}, {"labels": ["1", "2"]}),
        ({"question": "q", "options": ["a b", "c d"], "answer": "ii"}, {"labels": ["i", "ii", "iii"]}),
        ({"question": "q", "options": {"text": ["a b", "c d"], "label": ["7", "9"]}, "answer": "9"}, {}),
        (
            {"question": "q", "one": "a b", "two": "c d", "y": True},
            {"options": ["one", "two"], "columns": {"answer": "y"}},
        ),
    ],
)  # fmt: skip
def test_options_and_answers_in_every_form(row: dict[str, Any], keys: dict[str, Any], settings: Settings) -> None:
    example = made(row, settings, **keys)
    assert options_of(example) == [("Question: q\nAnswer:", " a b"), ("Question: q\nAnswer:", " c d")]
    assert example.options is not None and (example.options.right, example.options.lengths) == (1, (3, 3))


def test_options_in_the_blank_of_a_sentence(settings: Settings) -> None:
    row = {"s": "The _ is big.", "option1": "fox", "option2": "dog", "answer": "2"}
    keys = {"options": ["option1", "option2"], "labels": ["1", "2"], "columns": {"blank": "s"}}
    example = made(row, settings, **keys)
    assert options_of(example) == [("The fox", " is big."), ("The dog", " is big.")]
    assert example.options is not None and example.options.right == 1
    with pytest.raises(RowError, match="hold _ where the options go, and text after it"):
        made({**row, "s": "The fox is big."}, settings, **keys)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"options": ["a", "b"], "answer": None}, "options and no answer: None"),
        ({"options": ["a", "b"], "answer": ""}, "options and no answer: ''"),
        ({"options": ["a", "b"]}, "no column 'answer'"),
        ({"options": ["a", "b"], "answer": "c"}, "Answer 'c' is none of: a, b"),
        ({"options": ["a", "b"], "answer": 2}, "Answer '2' is none of: a, b"),
        ({"options": ["a", "b"], "answer": -1}, "Answer '-1' is none of: a, b"),
        ({"options": ["a"], "answer": 0}, "needs two options or more"),
        ({"options": ["a", " "], "answer": 0}, "Option 2 should be a text, and is ' '"),
        ({"options": ["a", None], "answer": 0}, "Option 2 should be a text, and is None"),
        ({"options": "a, b", "answer": 0}, "a list of texts, or {text: [...], label: [...]}, and are: a, b"),
        ({"options": {"text": ["a", "b"], "label": ["x", "y"]}, "answer": "A"}, "Answer 'A' is none of: x, y"),
        ({"options": {"text": ["a", "b"], "label": ["x"]}, "answer": "x"}, "There are 2 options and 1 names: x"),
        ({"options": ["1", "0"], "answer": "1"}, "the text of one option and the number or letter of another"),
    ],
)
def test_a_wrong_record_is_told(row: dict[str, Any], told: str, settings: Settings) -> None:
    with pytest.raises(RowError) as caught:
        made({"question": "q", **row}, settings)
    assert told in str(caught.value)


def test_numbers_count_and_texts_are_found() -> None:
    assert right_option(1, ["1", "0"], []) == 1
    assert right_option("A", ["x", "y"], []) == 0
    assert right_option("17", ["12", "17"], []) == 1


def test_ten_bad_records_are_listed(plain: Any, tmp_path: Path, settings: Settings) -> None:
    rows = [{"question": f"q{n}", "options": ["a", "b"], "answer": "a" if n % 2 else "z"} for n in range(30)]
    chosen = settings(format="multiple_choice", source=write_rows(tmp_path / "a.jsonl", rows))
    with pytest.raises(UserError) as caught:
        prepare(chosen, plain, tmp_path / "cache", 0)
    message = str(caught.value)
    assert "15 of 30 train records cannot be used; the first 10:" in message
    assert message.count("a.jsonl, line ") == 10


def test_a_held_out_record_holds_all_its_options(plain: Any, tmp_path: Path, settings: Settings) -> None:
    rows = [
        {"question": f"card {n}", "choices": {"text": ["fox", "brown dog", "jumps"][: 2 + n % 2]}, "answerKey": "B"}
        for n in range(12)
    ]
    chosen = settings(
        format="multiple_choice", source=write_rows(tmp_path / "a.jsonl", rows), validation=4, packing=True,
        columns={"options": "choices", "answer": "answerKey"},
    )  # fmt: skip
    found = prepare(chosen, plain, tmp_path / "cache", 0)
    train, held = found.train, found.validation
    assert held is not None and len(held) == 4 and len(train) == 1
    assert train.row(0).option_lengths == () and len(train.row(0).starts) == 8
    for n in range(4):
        row = held.row(n)
        bounds = [*row.starts, len(row.tokens)]
        texts = [plain.decode(row.tokens[a:b][row.targets[a:b]].tolist()) for a, b in pairwise(bounds)]
        assert texts == [" fox<eos>", " brown dog<eos>", " jumps<eos>"][: len(texts)]
        assert row.right == 1 and row.option_lengths == (3, 9, 5)[: len(texts)]
    assert {len(held.row(n).starts) for n in range(4)} == {2, 3}
    assert found.previews[0].endswith("«brown dog<eos>»") or "« brown dog<eos>»" in found.previews[0]


def test_the_longest_option_is_what_max_tokens_limits(plain: Any, tmp_path: Path, settings: Settings) -> None:
    rows = [{"question": f"q{n}", "options": ["fox", "dog " * (40 if n == 3 else 1)], "answer": 0} for n in range(8)]
    source, test = write_rows(tmp_path / "a.jsonl", rows[:3]), write_rows(tmp_path / "b.jsonl", rows)
    chosen = settings(format="multiple_choice", source=source, test=test, max_tokens=40, overlong="drop")
    found = prepare(chosen, plain, tmp_path / "cache", 0)
    assert found.reports["test"].dropped == 1 and found.reports["test"].kept == 7
    assert found.test is not None and np.all(found.test.lengths() > 0)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"overlong": "truncate"}, "would cut off the options, which stand at the end"),
        ({"options": ["a"]}, "data.options names 1 column"),
        ({"columns": {"blank": "s"}, "prompt": "{q}"}, "data.prompt and the column `blank`"),
        ({"columns": {"label": "s"}}, "names the role 'label'"),
    ],
)
def test_settings_that_do_not_fit(keys: dict[str, Any], told: str, settings: Settings) -> None:
    with pytest.raises(UserError) as caught:
        check_settings(settings(format="multiple_choice", **keys))
    assert told in str(caught.value)


HUB: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "arc_easy": (
        {"id": "1", "question": "Q?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
        ("Question: Q?\nAnswer:", " b"),
    ),
    "arc_challenge": (
        {"id": "1", "question": "Q?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        ("Question: Q?\nAnswer:", " b"),
    ),
    "openbookqa": (
        {"question_stem": "The sun is", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
        ("The sun is", " a"),
    ),
    "piqa": ({"goal": "G", "sol1": "a", "sol2": "b", "label": 1}, ("Question: G\nAnswer:", " b")),
    "siqa": (
        {"context": "C.", "question": "Q?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        ("Q: C. Q?\nA:", " c"),
    ),
    "winogrande": (
        {"sentence": "It is _ who ran.", "option1": "Ann", "option2": "Bo", "answer": "2"},
        ("It is Bo", " who ran."),
    ),
    "hellaswag": (
        {
            "activity_label": "Baking", "ctx_a": "Mix [header] it [title] Well.", "ctx_b": "then you", "ctx": "unused",
            "endings": ["eat [step] it.", "go  out."], "label": "1",
        },
        ("Baking: Mix it. Well. Then you", " go out."),
    ),
    "boolq": ({"question": "is it", "passage": "P.", "answer": True}, ("P.\nQuestion: is it?\nAnswer:", " yes")),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_a_benchmark_in_the_columns_of_its_hub(name: str) -> None:
    from glora_llm.schema import DataSection

    row, expected = HUB[name]
    chosen = DataSection.model_validate({"benchmark": name, "max_tokens": 64})
    check_settings(chosen)
    prompt, right = FORMATS.get(chosen.format)(row, chosen).segments
    assert (prompt.text, right.text) == expected


def test_every_benchmark_of_multiple_choice_is_tried() -> None:
    from glora_llm.schema.benchmarks import BENCHMARKS

    assert {name for name, known in BENCHMARKS.items() if known.kind == "multiple_choice"} == {*HUB} - {"boolq"}
