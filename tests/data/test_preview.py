"""Samples for the eye: one line, at most 400 characters, targets marked, nothing that a terminal would obey."""

from pathlib import Path
from typing import Any

import pytest

from glora_llm.data import prepare
from glora_llm.data.preview import LONGEST, shorten
from tests.data.conftest import Settings, write_rows


def previews(rows: list[dict[str, str]], settings: Any, tokenizer: Any, tmp_path: Path) -> list[str]:
    chosen = settings(source=write_rows(tmp_path / "a.jsonl", rows), format="prompt_completion", max_tokens=20_000)
    return prepare(chosen, tokenizer, tmp_path / "cache", seed=0).previews


def test_a_long_sample_shows_begin_targets_and_end(settings: Settings, plain: Any, tmp_path: Path) -> None:
    prompt, answer = "BEGIN " + "many words " * 300 + "before", " after" + " the answer" * 300 + " END"
    (text,) = previews([{"prompt": prompt, "completion": answer}], settings, plain, tmp_path)
    whole = f"{prompt}«{answer}<eos>»"
    assert len(text) <= LONGEST and text.startswith("BEGIN many words") and text.endswith(" END<eos>»")
    assert "words before« after the answer" in text
    parts = text.replace(" characters left out] ", " [").split(" [")
    assert sum(len(part) for part in parts[::2]) + sum(int(n.replace(",", "")) for n in parts[1::2]) == len(whole)
    assert all(part in whole for part in parts[::2]) and len(parts) == 5


def test_control_characters_are_escaped(settings: Settings, plain: Any, tmp_path: Path) -> None:
    row = {"prompt": "a\x1b[31mred\r\n\tb\x07", "completion": " ü\u202e\n"}
    (text,) = previews([row], settings, plain, tmp_path)
    assert text == r"a\x1b[31mred\r\n\tb\x07« ü\u202e\n<eos>»" and text.isprintable()


@pytest.mark.parametrize("length", [400, 401, 430, 500, 2_000, 3_000_000])
def test_no_place_makes_it_longer_or_loses_a_character(length: int) -> None:
    text = "".join(chr(0x100 + n % 50_000) for n in range(length))
    for place in {0, 1, 79, 80, 110, 151, 200, length // 2, length - 150, length - 1}:
        short = shorten(text, place)
        assert len(short) <= LONGEST and short.startswith(text[:80]) and short.endswith(text[-70:])
        assert text[place] in short
