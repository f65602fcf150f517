"""A tokenizer of the user's text: LLaMA's conventions, ids that transformers reads alike, texts that come back."""

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from glora_llm.errors import UserError
from glora_llm.models.tokenizer import load_tokenizer
from glora_llm.models.train_tokenizer import train_tokenizer

TEXT = (Path(__file__).parents[2] / "glora_llm/data/tinyshakespeare/validation.txt").read_text()
HARD = [
    " lead",
    "  two",
    "\n",
    "a\n\nb ",
    "\u65e5\u672c \U0001f642",
    "tab\t\r\n x ",
    "caf\u00e9 e\u0301",
    "\ufeffx",
    "1984",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([TEXT], 400, made)
    return made


def test_llamas_conventions(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == 400
    assert [tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token] == ["<unk>", "<s>", "</s>"]
    assert [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    ids = tokenizer(TEXT)["input_ids"]
    assert ids[0] == 1 and ids.count(1) == 1 and 2 not in ids and 0 not in ids
    assert len(ids) < 0.7 * len(TEXT), "merges were learnt"


@pytest.mark.parametrize("text", [TEXT, *HARD], ids=range(len(HARD) + 1))
def test_a_text_comes_back_exactly(folder: Path, text: str) -> None:
    for tokenizer in (load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
        assert ids == load_tokenizer(folder)(text)["input_ids"]


def test_sentencepiece_gives_the_same_ids(folder: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    pieces, tokenizer = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")), load_tokenizer(folder)
    for text in [TEXT[:3000], *HARD]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)


def test_the_same_text_gives_the_same_file(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "tokenizer.model").read_bytes()
    train_tokenizer([TEXT[:5000]], 400, tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() != whole
    cut = TEXT.index("\n", 9000)
    train_tokenizer(iter([TEXT[:cut], TEXT[cut:]]), 400, tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == whole


@pytest.mark.parametrize(
    ("texts", "size", "said"),
    [
        ([TEXT], 100, "A vocabulary of 100 is too small: bytes and special tokens take 259."),
        ([TEXT], 270, "characters, bytes and special tokens alone take"),
        ([TEXT], 90_000, "the text has no more than"),
        ([], 400, "Is there any text?"),
        (["\n\n"], 400, "Is there any text?"),
    ],
)
def test_sizes_that_do_not_fit(texts: list[str], size: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        train_tokenizer(texts, size, tmp_path)
    assert list(tmp_path.iterdir()) == []
