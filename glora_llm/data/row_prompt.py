"""The prompt of a prepared row, and the answer that it has."""

import numpy as np

from glora_llm.data.sample import Tokens
from glora_llm.data.store import Row


def prompt_and_answer(row: Row) -> tuple[Tokens, Tokens]:
    """Return the tokens before the last answer of a row, and those of that answer, its end token included.

    Args:
        row: of one sample; of a conversation the last turn to learn is the answer.
    """
    places = np.flatnonzero(row.targets)
    gaps = np.flatnonzero(np.diff(places) > 1)
    first, last = int(places[gaps[-1] + 1] if len(gaps) else places[0]), int(places[-1])
    return row.tokens[:first], row.tokens[first : last + 1]
