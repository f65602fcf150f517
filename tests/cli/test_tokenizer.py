"""`glora-llm tokenizer train`: a folder that recipes and transformers take."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from glora_llm.cli import main

TEXT = Path(__file__).parents[2] / "glora_llm" / "data" / "tinyshakespeare" / "test.txt"


def command(*more: str, out: Path) -> int:
    return main(["tokenizer", "train", *more, "--out", str(out)])


def test_a_tokenizer_of_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"said": "qqqq xyzzy xyzzy"}\n' * 200)
    assert command(str(TEXT), "--vocab-size", "400", out=tmp_path / "one") == 0
    assert "400 pieces, as model.tokenizer of a recipe" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert command(str(rows), "--column", "said", "--vocab-size", "280", out=tmp_path / "two") == 0
    one, two = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert len(two("xyzzy").input_ids) < len(one("xyzzy").input_ids)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([str(TEXT), "--vocab-size", "20"], "A vocabulary of 20 is too small"),
        (["absent.txt", "--vocab-size", "400"], "There is no file absent.txt"),
        (
            ["embedded:banking77", "--column", "txt", "--vocab-size", "400"],
            "has no text in column 'txt'; it has",
        ),
    ],
)
def test_what_cannot_be_trained(more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*more, out=tmp_path / "out") == 2
    assert said in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(str(TEXT), "--vocab-size", "400", out=tmp_path) == 2
    assert "exists already" in capsys.readouterr().err
