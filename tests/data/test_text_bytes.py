"""The bytes of raw text that tokens stand for, and bits per byte, against naive counts on multi-byte text."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glora_llm.data.prepare import prepare
from glora_llm.data.text_bytes import token_bytes
from glora_llm.schema import DataSection
from glora_llm.tasks.task import COLUMNS
from glora_llm.tasks.text import bits_per_byte

# One, two, three and four bytes a character, spaces at both ends, a character of several code points.
TEXTS = [
    "Größe: 12 µm, naïve café",
    "  日本語のテキスト と English  ",
    "🙂🙂 ok 👩‍🚀 end",
    "plain",
    "\u2581 sign\n\n\ttabs",
]


def naive(offsets: list[tuple[int, int]], text: str) -> list[int]:
    """Bytes of the characters that no token before has ended, one character after the other."""
    seen, found = 0, []
    for number, (_, end) in enumerate(offsets):
        reach = len(text) if number + 1 == len(offsets) else max(end, seen)
        found.append(len(text[seen:reach].encode("utf-8")))
        seen = reach
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_stand_for_all_bytes_of_a_text(text: str, bpe: Any) -> None:
    spots = bpe(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    counts = token_bytes(np.array(spots).reshape(-1, 2), text).tolist()
    assert counts == naive(spots, text) and sum(counts) == len(text.encode("utf-8")) and min(counts) >= 0
    assert token_bytes(np.zeros((0, 2), dtype=np.int64), "").tolist() == []


@pytest.mark.parametrize(("overlong", "packing"), [("split", True), ("split", False), ("truncate", False)])
@pytest.mark.parametrize("bos", ["always", "auto"])
def test_rows_know_the_bytes_of_their_targets(
    tmp_path: Path, plain: Any, overlong: Any, packing: bool, bos: Any
) -> None:
    for name, texts in (("train", [f"{text} more" for text in TEXTS]), ("held", TEXTS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = DataSection(
        format="text", source=str(tmp_path / "train.jsonl"), validation=str(tmp_path / "held.jsonl"), max_tokens=8,
        overlong=overlong, packing=packing, bos=bos,
    )  # fmt: skip
    data = prepare(settings, plain, tmp_path / "cache", 0)
    assert data.train.text_bytes() is None and data.validation is not None
    counts = data.validation.text_bytes()
    assert counts is not None and len(counts) == len(data.validation)
    spots = [plain(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"] for text in TEXTS]
    whole = [naive(spot, text) for spot, text in zip(spots, TEXTS, strict=True)]
    skipped = 0 if bos == "always" else 1  # without BOS nothing predicts the first token
    if overlong == "split":
        assert counts.sum() == sum(sum(one[skipped:]) for one in whole)
        if bos == "always":
            assert counts.sum() == sum(len(text.encode("utf-8")) for text in TEXTS)
    else:
        assert counts.tolist() == [sum(one[skipped : 7 + skipped]) for one in whole]


def test_bits_per_byte_is_the_length_of_the_text() -> None:
    table = torch.zeros(2, len(COLUMNS), dtype=torch.float64)
    table[:, 0] = torch.tensor([math.log(2) * 6, math.log(2) * 10], dtype=torch.float64)
    table[:, COLUMNS.index("text_bytes")] = torch.tensor([3.0, 5.0])
    assert bits_per_byte(table, "test") == {"test/bits_per_byte": pytest.approx(2.0, abs=1e-15)}
    table[:, COLUMNS.index("text_bytes")] = 0
    assert bits_per_byte(table, "test") == {}
