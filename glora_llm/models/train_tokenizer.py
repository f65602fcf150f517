"""A sentencepiece BPE tokenizer of LLaMA's kind, trained on the user's text."""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from glora_llm.errors import UserError
from glora_llm.models.sentencepiece_bpe import load_sentencepiece

SMALLEST = 3 + 256 + 1  # <unk>, <s>, </s>, all bytes, and one piece of text
LONGEST_LINE = 1 << 20  # bytes; sentencepiece leaves out what is longer
LLAMA: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,  # what no piece covers, line breaks among it, is written as bytes: nothing is unknown
    "character_coverage": 0.99995,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": True,
    "allow_whitespace_only_pieces": True,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "minloglevel": 2,
}


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a tokenizer and write it into an existing folder: tokenizer.model, and what transformers reads.

    LLaMA's conventions: byte-pair merges, digits by themselves, bytes for what no piece covers, `<unk>` 0, `<s>` 1,
    which begins every text, and `</s>` 2, which ends one. The same texts give the same file.

    Raises:
        UserError: when the size is too small, or larger than the text has pieces for; or there is no text.
    """
    from sentencepiece import SentencePieceTrainer

    if vocab_size < SMALLEST:
        raise UserError(f"A vocabulary of {vocab_size} is too small: bytes and special tokens take {SMALLEST - 1}.")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            vocab_size=vocab_size,
            max_sentence_length=LONGEST_LINE,
            **LLAMA,
        )
    except RuntimeError as error:
        raise UserError(f"No tokenizer of {vocab_size} pieces: {_reason(str(error))}") from error
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    load_sentencepiece(folder).save_pretrained(folder)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (line for line in text.split("\n") if line)


def _reason(message: str) -> str:
    """Return what sentencepiece means, in words of this package."""
    most = re.search(r"value <= (\d+)", message)
    if most:
        return f"the text has no more than {most[1]}. Use a smaller vocabulary, or more text."
    least = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if least:
        return f"characters, bytes and special tokens alone take {least[1]}. Use a larger vocabulary."
    return f"{' '.join(message.split())}. Is there any text?"
