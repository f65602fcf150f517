"""Rows of text -> tokens and targets -> batches, and the order in which processes see them. Imports no torch by itself.

`prepare` reads, splits, tokenises and caches; `GlobalSampler` gives the rows of a step; `collate` makes tensors.
"""

from glora_llm.data import choices as choices  # registers the format multiple_choice
from glora_llm.data.batch import collate, collate_joined
from glora_llm.data.formats import FORMATS, Example, Message, Segment
from glora_llm.data.prepare import Prepared, prepare
from glora_llm.data.report import Report
from glora_llm.data.sampler import GlobalSampler
from glora_llm.data.store import Row, TokenSet

__all__ = [
    "FORMATS",
    "Example",
    "GlobalSampler",
    "Message",
    "Prepared",
    "Report",
    "Row",
    "Segment",
    "TokenSet",
    "collate",
    "collate_joined",
    "prepare",
]
