"""A sample as one short line of text, with its targets marked, for the eye."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from glora_llm.data.bad_rows import printable
from glora_llm.data.sample import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 400  # characters of a preview
# Of a longer one: the begin, the text before and after the begin of the first target, and the end.
BEGIN, BEFORE, AFTER, END = 80, 70, 90, 90
SMALL_GAP = 30  # characters: no longer than the note that would stand in their place


def preview(sample: Sample, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a sample as text of at most 400 characters, decoded from its tokens, every run of targets in « and ».

    Line breaks and other control characters are written as escapes.
    """
    edges = (np.flatnonzero(np.diff(sample.targets)) + 1).tolist()
    pieces = []
    written = ""
    for start, stop in zip([0, *edges], [*edges, len(sample.tokens)], strict=True):
        text = _decode(sample.tokens[:stop].tolist(), tokenizer)
        piece, written = printable(text[len(written) :]), text
        pieces.append(f"«{piece}»" if sample.targets[start] else piece)
    return shorten("".join(pieces), len(pieces[0]))  # the first token is never a target


def shorten(text: str, place: int) -> str:
    """Return at most 400 characters of a text: its begin, what is around `place`, and its end.

    In each gap stands the number of characters that were left out.
    """
    if len(text) <= LONGEST:
        return text
    parts, done = [], 0
    for start, stop in ((0, BEGIN), (place - BEFORE, place + AFTER), (len(text) - END, len(text))):
        gap = start - done
        if gap > SMALL_GAP:
            parts.append(f" [{gap:,} characters left out] ")
            done = start
        parts.append(text[done:stop])
        done = max(done, stop)
    return "".join(parts)


def _decode(tokens: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
