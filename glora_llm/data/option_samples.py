"""The options of a held-out record as one sample, which holds a sequence for each of them."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from glora_llm.data.bad_rows import BadRows, RowError
from glora_llm.data.formats import Example
from glora_llm.data.report import Report
from glora_llm.data.sample import OptionSpans, Sample
from glora_llm.data.tokenize import tokenize, tokenize_each
from glora_llm.schema import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize_options(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    settings: DataSection,
    report: Report,
    bad: BadRows,
) -> list[Sample]:
    """Return one sample for each example of multiple choice: the sequences of all its options, end to end.

    Args:
        bad: takes in the examples of which an option cannot be rendered, or has no token of its own.

    Raises:
        UserError: as `tokenize`.
    """
    options = [_options(example) for example in examples]
    flat = [one for of_example in options for one in of_example]
    tokenized = iter(tokenize_each(flat, tokenizer, settings, report, BadRows()))
    samples = []
    for example, of_example in zip(examples, options, strict=True):
        made = [next(tokenized) for _ in of_example]
        with bad.collecting(example.origin):
            sequences = [
                sample or _reason(one, tokenizer, settings) for sample, one in zip(made, of_example, strict=True)
            ]
            samples.append(_joined(example, sequences))
    return samples


def _options(example: Example) -> list[Example]:
    assert example.options is not None
    return [replace(example, segments=segments, options=None) for segments in example.options.segments]


def _reason(option: Example, tokenizer: "PreTrainedTokenizerBase", settings: DataSection) -> Sample:
    """Raise what is wrong with an option."""
    bad = BadRows()
    tokenize([option], tokenizer, settings, Report(""), bad)
    reason, shown = next(iter(bad.shown.items()))
    raise RowError(reason, shown[0][1])


def _joined(example: Example, sequences: list[Sample]) -> Sample:
    assert example.options is not None
    for number, sequence in enumerate(sequences, 1):
        if sequence.targets.sum() < 2:  # the last one is the end token, which no option is scored by
            raise RowError(
                "an option without a token of its own",
                f"option {number} has no token of its own: its characters belong to a token of the prompt. End "
                "data.prompt with a word or a line break",
            )
    lengths = [len(sequence.tokens) for sequence in sequences]
    spans = OptionSpans((0, *accumulate(lengths[:-1])), example.options.lengths, example.options.right)
    tokens = np.concatenate([sequence.tokens for sequence in sequences])
    return Sample(tokens, np.concatenate([sequence.targets for sequence in sequences]), spans)
