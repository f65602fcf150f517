"""Example -> tokens and the mask of what is learnt, and what happens to samples that are too long."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glora_llm.data.bad_rows import BadRows, RowError
from glora_llm.data.formats import Example
from glora_llm.data.render import Rendered, render
from glora_llm.data.report import Report
from glora_llm.data.sample import Mask, Sample, Tokens
from glora_llm.data.text_bytes import closed, part_of, token_bytes
from glora_llm.errors import UserError
from glora_llm.schema import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Offsets = NDArray[np.int64]

CHUNK = 256


@dataclass(frozen=True)
class Ends:
    """The tokens that begin and end a sample.

    Attributes:
        bos: the id every sample begins with; none: nothing is put in front.
        strip: an id that is taken from the front (data.bos=never, a template that writes it); else none.
        eos: the id that ends an answer.
        closing: ids that may end an answer: eos, and every special token that a template may end a turn with.
    """

    bos: int | None
    strip: int | None
    eos: int
    closing: frozenset[int]


def ends_of(tokenizer: "PreTrainedTokenizerBase", settings: DataSection) -> Ends:
    """Return how samples begin and end with this tokenizer.

    `auto` begins with BOS where the tokenizer itself does, and for LLaMA's sentencepiece tokenizers, whose models were
    trained with `<s>` although transformers 5 no longer adds it.

    Raises:
        UserError: when the tokenizer is not a fast one, has no end token, or no BOS although data.bos=always.
    """
    name = type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise UserError(
            f"{name} is a slow tokenizer and knows no character offsets; load one that has a tokenizer.json "
            "(use_fast=True)."
        )
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if eos is None:
        raise UserError(
            f"{name} has no eos_token, so the model would never learn to stop: set tokenizer.eos_token to the token "
            "that ends an answer."
        )
    if settings.bos == "always" and bos is None:
        raise UserError(f"data.bos=always, but {name} has no bos_token: use data.bos=auto, or set tokenizer.bos_token.")
    is_llama = name.startswith("LlamaTokenizer") and tokenizer.bos_token == "<s>"
    uses_bos = bos is not None and (settings.bos == "always" or is_llama or tokenizer("x")["input_ids"][:1] == [bos])
    special = (int(n) for n, token in tokenizer.added_tokens_decoder.items() if token.special)
    return Ends(
        bos=bos if uses_bos and settings.bos != "never" else None,
        strip=bos if settings.bos == "never" and bos != eos else None,
        eos=eos,
        closing=frozenset({*special} - {bos} | {eos}),
    )


def tokenize(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    settings: DataSection,
    report: Report,
    bad: BadRows | None = None,
) -> list[Sample]:
    """Return one sample for each example, whatever its length; tokens on a boundary are counted in `report`.

    Args:
        bad: takes in the examples that cannot be rendered, have no target, or whose last target is not an end token;
            None: they are an error.

    Raises:
        UserError: as `render` and `ends_of`.
    """
    found = BadRows(report.role, len(examples)) if bad is None else bad
    samples = tokenize_each(examples, tokenizer, settings, report, found)
    if bad is None:
        found.require_none()
    return [sample for sample in samples if sample is not None]


def tokenize_each(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    settings: DataSection,
    report: Report,
    found: BadRows,
) -> list[Sample | None]:
    """Return the sample of each example, in their order, or None for one that `found` took in (see `tokenize`)."""
    from tqdm import tqdm

    ends = ends_of(tokenizer, settings)
    samples: list[Sample | None] = []
    with tqdm(total=len(examples), desc=f"tokenise {report.role}", disable=not sys.stderr.isatty()) as bar:
        for first in range(0, len(examples), CHUNK):
            chunk = examples[first : first + CHUNK]
            made: list[Sample | None] = [None] * len(chunk)
            rendered: dict[int, Rendered] = {}
            for number, example in enumerate(chunk):
                with found.collecting(example.origin):
                    rendered[number] = render(example, tokenizer, settings)
            encoded = _encoded(list(rendered.values()), tokenizer)
            for (number, written), (ids, spots) in zip(rendered.items(), encoded, strict=True):
                targets, straddling = mark(spots, written)
                sample = close(ids, targets, ends, written.add_end, chunk[number].label)
                if settings.format == "text" and report.role != "train":
                    counts = token_bytes(spots, written.text)
                    counts = closed(counts, ids, len(sample.tokens), ends.bos, ends.strip)
                    sample = replace(sample, text_bytes=counts)
                with found.collecting(chunk[number].origin):
                    _check(sample, written, ends, tokenizer)
                    made[number] = sample
                    report.boundary_tokens += straddling
            samples += made
            bar.update(len(chunk))
    return samples


def _encoded(rendered: Sequence[Rendered], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[Tokens, Offsets]]:
    """Return the token ids (T) and the characters (T, 2) of each text."""
    if not rendered:
        return []
    texts = [written.text for written in rendered]
    encoded: Any = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        (np.asarray(ids, dtype=np.int32), np.asarray(spots, dtype=np.int64).reshape(-1, 2))
        for ids, spots in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def mark(offsets: Offsets, rendered: Rendered) -> tuple[Mask, int]:
    """Return which tokens are targets, and how many hold a boundary and are therefore not.

    A token is a target when it begins at or after the start of a span and ends inside it. `offsets` (T, 2) are
    characters; a tokenizer that trims spaces from them gives a lone space the empty range at its end, which counts too.
    """
    begin, end = offsets[:, 0], offsets[:, 1]
    targets = np.zeros(len(offsets), dtype=np.bool_)
    straddling = 0
    for start, stop in rendered.spans:
        targets |= (begin >= start) & (end > start) & (end <= stop)
        straddling += int(((begin < start) & (end > start)).sum())
    return targets, straddling


def close(tokens: Tokens, targets: Mask, ends: Ends, add_end: bool, label: str | float | None = None) -> Sample:
    """Return the sample with exactly one BOS in front, where the family uses one, and its end token."""
    if ends.strip is not None and tokens[:1].tolist() == [ends.strip]:
        tokens, targets = tokens[1:], targets[1:]
    if ends.bos is not None and tokens[:1].tolist() != [ends.bos]:
        tokens, targets = np.insert(tokens, 0, ends.bos), np.insert(targets, 0, False)
    if add_end and tokens[-1:].tolist() != [ends.eos]:
        tokens, targets = np.append(tokens, np.int32(ends.eos)), np.append(targets, True)
    targets[:1] = False
    return Sample(tokens, targets, label=label)


def _check(sample: Sample, rendered: Rendered, ends: Ends, tokenizer: "PreTrainedTokenizerBase") -> None:
    places = np.flatnonzero(sample.targets)
    if not len(places):
        raise RowError(
            "no token to learn",
            f"there is no token to learn: {rendered.text[:300]!r}. A conversation needs a turn of the assistant, a "
            "text at least two tokens.",
        )
    last = int(sample.tokens[places[-1]])
    if last not in ends.closing:
        raise RowError(
            "no end token after the answer",
            f"the answer ends with {tokenizer.convert_ids_to_tokens(last)!r} instead of an end token "
            f"({tokenizer.convert_ids_to_tokens(sorted(ends.closing)[:8])}), so the model would never learn to stop: "
            f"{rendered.text[-200:]!r}. Let the chat template end a turn with one, or set data.chat_template=none.",
        )


def fit_length(samples: list[Sample], settings: DataSection, bos: int | None, report: Report) -> list[Sample]:
    """Return the samples with none longer than data.max_tokens, by data.overlong; count in `report` what was done.

    Args:
        bos: the id that a piece of a split sample begins with too.

    Raises:
        UserError: when there are longer samples and data.overlong=error; when no sample is left.
    """
    most = settings.max_tokens
    lengths = [sample.length for sample in samples]
    report.longest = max(lengths, default=0)
    overlong = sum(length > most for length in lengths)
    if overlong and settings.overlong == "error":
        others = {"classification": "drop", "multiple_choice": "drop", "text": "drop, truncate or split"}
        raise UserError(
            f"{overlong} of {len(samples)} {report.role} samples are longer than data.max_tokens={most}; the longest "
            f"has {report.longest} tokens. Set data.max_tokens={report.longest}, or data.overlong to "
            f"{others.get(settings.format, 'drop or truncate')}."
        )
    kept: list[Sample] = []
    for sample in samples:
        kept += [sample] if sample.length <= most else _shorten(sample, settings, bos, report)
    if not kept:
        raise UserError(
            f"No {report.role} sample is left: all {len(samples)} are longer than data.max_tokens={most} (the longest: "
            f"{report.longest}) and data.overlong={settings.overlong}. Raise data.max_tokens."
        )
    return kept


def _shorten(sample: Sample, settings: DataSection, bos: int | None, report: Report) -> list[Sample]:
    most = settings.max_tokens
    if settings.overlong == "split":
        report.split += 1
        return cut(sample, most, bos)
    if settings.overlong == "truncate" and sample.targets[:most].any():
        report.truncated += 1
        return [Sample(sample.tokens[:most], sample.targets[:most], text_bytes=part_of(sample.text_bytes, 0, most))]
    report.dropped += 1
    return []


def cut(sample: Sample, most: int, bos: int | None) -> list[Sample]:
    """Return consecutive pieces of at most `most` tokens, in which every token but the sample's first is learnt once.

    The first token of a piece is never learnt, so it is BOS, or else the last token of the piece before.
    """
    return [piece(sample, start, most, bos) for start in range(1, len(sample.tokens), most - 1)]


def piece(sample: Sample, start: int, most: int, bos: int | None) -> Sample:
    """Return the piece of at most `most` tokens that learns the sample's tokens from `start` (1 or more) on."""
    body = sample.tokens[start : start + most - 1]
    context = sample.tokens[start - 1] if bos is None or start == 1 else bos
    targets = np.insert(sample.targets[start : start + most - 1], 0, False)
    counts = part_of(sample.text_bytes, start, start + most - 1, before=0)
    return Sample(np.insert(body, 0, context), targets, text_bytes=counts)


def fill_rows(
    samples: Sequence[Sample], most: int, bos: int | None, report: Report
) -> tuple[list[Sample], list[list[int]]]:
    """Return pieces of the samples, and rows of piece numbers, each row exactly `most` tokens long but the last.

    A sample goes on in the next row where a row is full. One token of room is never left: a piece is at least two
    tokens, so the piece before gives up its last one. (Only a piece of two tokens has none to give; that row is one
    token short.)

    Args:
        bos: the id that a piece begins with; None: the token before it.
    """
    report.longest = max((len(sample.tokens) for sample in samples), default=0)
    pieces: list[Sample] = []
    rows: list[list[int]] = [[]]
    room = most
    for sample in samples:
        start, before = 1, len(pieces)
        while start < len(sample.tokens):
            if room < 2:
                rows.append([])
                room = most
            left = len(sample.tokens) - start + 1
            size = min(left, room)
            if room - size == 1 and size > 2:
                size -= 1
            rows[-1].append(len(pieces))
            pieces.append(piece(sample, start, size, bos))
            start, room = start + size - 1, room - size
        report.split += len(pieces) - before > 1
    return pieces, rows
