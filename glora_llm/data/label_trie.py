"""The label words of a classification task as a tree of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NO_TOKEN = -1


@dataclass(frozen=True)
class LabelTrie:
    """The tokens that may follow each prefix of a label word, in ascending order."""

    next_tokens: dict[tuple[int, ...], list[int]]

    @classmethod
    def build(cls, words: Sequence[Sequence[int]]) -> "LabelTrie":
        """Make the trie of all label words, each given as its target tokens (the end token included)."""
        found: dict[tuple[int, ...], set[int]] = {}
        for word in words:
            for at, token in enumerate(word):
                found.setdefault(tuple(word[:at]), set()).add(token)
        return cls({prefix: sorted(tokens) for prefix, tokens in found.items()})

    def choices(self, targets: Sequence[int]) -> NDArray[np.int64]:
        """Return the tokens that may stand in place of each target, given the targets before it.

        Args:
            targets: the N target tokens of one row.

        Returns:
            (N, C), C the most choices of any prefix. A shorter list repeats its first token, so that the most likely
            one is the same; where no label word goes on, the row is `NO_TOKEN`.
        """
        width = max(len(tokens) for tokens in self.next_tokens.values())
        table = np.full((len(targets), width), NO_TOKEN, dtype=np.int64)
        for at in range(len(targets)):
            tokens = self.next_tokens.get(tuple(targets[:at]))
            if tokens:
                table[at] = tokens + tokens[:1] * (width - len(tokens))
        return table
