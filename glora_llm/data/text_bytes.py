"""The UTF-8 bytes of the raw text that each token stands for: what a loss is divided by so that tokenizers compare."""

import numpy as np
from numpy.typing import NDArray

from glora_llm.data.sample import ByteCounts, Tokens


def token_bytes(offsets: NDArray[np.int64], text: str) -> ByteCounts:
    """Return the UTF-8 bytes of `text` that each token stands for, (T): together they are all bytes of the text.

    A token stands for the characters from the end of those before it to its own end, with what a tokenizer leaves out
    of its offsets (spaces); the last one for the rest. Of a character that is cut into several tokens the first one
    counts all bytes: they all have the same offsets.

    Args:
        offsets: (T, 2), characters.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    widths = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    before = np.concatenate([[0], np.cumsum(widths)])  # bytes before each character
    ends = before[np.maximum.accumulate(offsets[:, 1])] if len(offsets) else np.zeros(0, dtype=np.int64)
    ends[-1:] = before[-1]
    counts: ByteCounts = np.diff(ends, prepend=0)
    return counts


def closed(counts: ByteCounts, tokens: Tokens, length: int, bos: int | None, strip: int | None) -> ByteCounts:
    """Return the bytes of the sample that `tokenize.close` made of tokens: BOS and the end token stand for no text.

    Args:
        counts: of the tokens, (T).
        tokens: before they were closed, (T).
        length: of the sample.
        bos, strip: as of `tokenize.Ends`.
    """
    if strip is not None and tokens[:1].tolist() == [strip]:
        counts, tokens = counts[1:], tokens[1:]
    if bos is not None and tokens[:1].tolist() != [bos]:
        counts = np.insert(counts, 0, 0)
    return np.append(counts, np.zeros(length - len(counts), dtype=np.int64))


def part_of(counts: ByteCounts | None, start: int, stop: int, before: int | None = None) -> ByteCounts | None:
    """Return the bytes of some tokens of a sample, with those of a token in front of them; None: none are known."""
    if counts is None:
        return None
    return counts[start:stop] if before is None else np.insert(counts[start:stop], 0, before)
