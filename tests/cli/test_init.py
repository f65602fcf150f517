"""`glora-llm init`: a recipe for files that the project does not know."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glora_llm import recipe
from glora_llm.cli import main

Write = Callable[..., Path]
TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}]
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "alpaca": ([{"instruction": "Add", "input": "2, 3", "output": "5"}], {"format": "alpaca"}),
    "dolly": (
        [{"instruction": "Add", "context": "2, 3", "response": "5"}],
        {"format": "alpaca", "columns": {"output": "response", "input": "context"}},
    ),
    "openai": ([{"messages": TURNS}], {"format": "chat", "columns": None}),
    "sharegpt": (
        [{"id": "1", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
        {"format": "chat", "columns": None},
    ),
    "dialog": ([{"dialog": TURNS}], {"format": "chat", "columns": {"messages": "dialog"}}),
    "pairs": ([{"prompt": "2 + 3 =\n", "completion": "5"}], {"format": "prompt_completion", "prompt": None}),
    "questions": (
        [{"question": "2 + 3?", "answer": "5"}],
        {"columns": {"completion": "answer"}, "prompt": "Question: {question}\nAnswer: "},
    ),
    "labels": (
        [{"review": "good", "sentiment": "yes"}, {"review": "bad", "sentiment": "no"}],
        {"format": "classification", "columns": {"label": "sentiment"}, "prompt": "{review}\nLabel:"},
    ),
    "two texts": (
        [{"sentence1": "a", "sentence2": "b", "label": 0}, {"sentence1": "c", "sentence2": "d", "label": 1}],
        {"format": "classification", "prompt": "{sentence1}\n{sentence2}\nLabel:", "labels": ["0", "1"]},
    ),
    "text": ([{"id": 1, "text": "It was the best of times."}], {"format": "text", "overlong": "split"}),
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)

    def jsonl(rows: list[dict[str, Any]], name: str = "mine.jsonl", times: int = 20) -> Path:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows) * times)
        return file

    return jsonl


@pytest.mark.parametrize(("rows", "wanted"), CASES.values(), ids=CASES)
def test_the_format_follows_the_columns(rows: list[dict[str, Any]], wanted: dict[str, Any], write: Write) -> None:
    write(rows)
    assert main(["init", "mine.jsonl", "--base", "embedded:tiny-llama"]) == 0
    made = recipe.load("mine.yaml")
    assert {name: getattr(made.data, name) for name in wanted} == wanted
    assert made.data.source == "mine.jsonl" and made.model.name_or_path == "embedded:tiny-llama"
    assert made.training.steps and made.training.global_batch % made.training.micro_batch == 0


def test_lengths_decide_max_tokens_and_what_is_dropped_is_said(write: Write) -> None:
    rows = [{"prompt": "x" * 100, "completion": "y" * 20}] * 199 + [{"prompt": "x" * 5000, "completion": "y"}]
    write(rows, times=1)
    assert main(["init", "mine.jsonl", "--base", "embedded:tiny-llama"]) == 0  # a byte is a token there
    assert recipe.load("mine.yaml").data.max_tokens == 192
    text = Path("mine.yaml").read_text()
    assert "overlong: drop  # 0.5 % of the samples" in text and "longest 5010 (by its tokenizer)" in text


def test_a_chat_is_measured_in_the_base_s_template(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """The template of SmolLM2 puts a system message of 20 tokens before every chat."""
    write([{"messages": [{"role": "user", "content": "a" + " a" * n}, TURNS[1]]} for n in range(40)], times=1)
    assert main(["init", "mine.jsonl"]) == 0
    longest = int(Path("mine.yaml").read_text().split(", longest ")[1].split()[0])
    assert main(["train", "--recipe", "mine.yaml", "--dry-run", "data.validation=null", "evaluation.every=null"]) == 0
    assert f"longest {longest}" in capsys.readouterr().out


def test_a_folder_brings_its_own_validation_split(write: Write) -> None:
    Path("data").mkdir()
    write(CASES["pairs"][0], "data/train.jsonl")
    write(CASES["pairs"][0], "data/valid.jsonl")
    assert main(["init", "data", "--out", "own.yaml", "--base", "embedded:tiny-llama"]) == 0
    assert recipe.load("own.yaml").data.validation == "validation"


def test_a_base_that_is_not_here_is_estimated(write: Write) -> None:
    write(CASES["alpaca"][0])
    assert main(["init", "mine.jsonl", "--base", "some/hub-model"]) == 0
    assert "estimated at 3.5 characters a token" in Path("mine.yaml").read_text()
    assert recipe.load("mine.yaml").model.quantization == "nf4"


def test_records_that_do_not_fit_are_named(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write([{"messages": TURNS}] * 30 + [{"messages": [{"role": "robot", "content": "?"}]}], times=1)
    assert main(["init", "mine.jsonl", "--base", "embedded:tiny-llama"]) == 0
    assert "not every record fits format chat. The first: Unknown role 'robot'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["absent.jsonl"], "There is no file absent.jsonl"),
        (["odd.jsonl"], "The columns a, b do not look like any of chat, alpaca"),
        (["mine.jsonl", "--task", "chat"], "The columns prompt, completion do not look like chat"),
        (["mine.jsonl", "--task", "alpacca"], "Did you mean 'alpaca'?"),
        (["mine.jsonl", "--task", "images"], "Unknown data format 'images'"),
        (["mine.jsonl", "--out", "there.yaml"], "there.yaml exists already"),
        (["mine.jsonl", "--out", "recipe.txt"], "a recipe's name ends in .yaml"),
        (["few.jsonl"], "holds 3 records; at least 4 are needed"),
    ],
)
def test_wrong_input_is_one_message_and_writes_nothing(
    arguments: list[str], said: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write(CASES["pairs"][0])
    write([{"a": 1, "b": 2}], "odd.jsonl")
    write(CASES["pairs"][0], "few.jsonl", times=3)
    Path("there.yaml").touch()
    before = sorted(Path.cwd().rglob("*"))
    assert main(["init", *arguments, "--base", "embedded:tiny-llama"]) == 2
    assert said in capsys.readouterr().err
    assert sorted(Path.cwd().rglob("*")) == before


def test_what_init_writes_passes_a_dry_run(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write([{"question": f"{n} + {n}?", "answer": str(2 * n)} for n in range(40)], times=1)
    assert main(["init", "mine.jsonl", "--base", "embedded:tiny-llama"]) == 0
    assert main(["train", "--recipe", "mine.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "train: 38" in out and "validation: 2" in out
