"""Example -> the tokens of its prompt alone, for a head that answers with a class or a number."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from glora_llm.data.bad_rows import BadRows, RowError
from glora_llm.data.formats import Example
from glora_llm.data.report import Report
from glora_llm.data.sample import Sample
from glora_llm.data.tokenize import close, ends_of
from glora_llm.schema import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize_prompts(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    settings: DataSection,
    report: Report,
    bad: BadRows | None = None,
) -> list[Sample]:
    """Return one sample for each example: what stands before the answer, and no token of it to learn.

    The tokenizer's own special tokens are around it ([CLS] and [SEP] of an encoder); BOS as in `tokenize`.

    Args:
        bad: takes in the examples whose prompt has no token; None: they are an error.

    Raises:
        UserError: as `ends_of`.
    """
    found = BadRows(report.role, len(examples)) if bad is None else bad
    ends = None if tokenizer.eos_token_id is None else ends_of(tokenizer, settings)
    texts = ["".join(part.text for part in example.segments if not part.is_target) for example in examples]
    encoded: Any = tokenizer(texts, add_special_tokens=True, verbose=False)["input_ids"] if texts else []
    samples = []
    for example, ids in zip(examples, encoded, strict=True):
        tokens, targets = np.asarray(ids, dtype=np.int32), np.zeros(len(ids), dtype=np.bool_)
        with found.collecting(example.origin):
            sample = Sample(tokens, targets, label=example.label)
            if ends is not None:
                sample = close(tokens, targets, ends, add_end=False, label=example.label)
            if not len(sample.tokens):
                raise RowError("no token in the prompt", "the prompt has no token, so there is nothing to answer to")
            samples.append(sample)
    if bad is None:
        found.require_none()
    return samples
