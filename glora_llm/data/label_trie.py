"""The label words of a classification task as a tree of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from glora_llm.data.sample import Sample
from glora_llm.data.tokenize import ends_of
from glora_llm.errors import UserError
from glora_llm.schema import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

    def first_classes(self, sequences: Sequence[Sequence[int]], classes: Sequence[int]) -> list[int] | None:
        """Return the class of each token by which label words differ first, as `choices` lists them.

        Args:
            sequences: the label words.
            classes: the class number of each.

        Returns:
            None where the words of two classes go on with the same token there: one token then tells no class.
        """
        words, same = [tuple(word) for word in sequences], 0
        while len(words) > 1 and len({word[: same + 1] for word in words}) == 1:
            same += 1
        found: dict[int, set[int]] = {}
        for word, number in zip(words, classes, strict=True):
            found.setdefault(word[same], set()).add(number)
        if any(len(numbers) > 1 for numbers in found.values()):
            return None
        return [next(iter(found[token])) for token in self.next_tokens[words[0][:same]]]


def label_sequences(
    samples: Sequence[Sample], classes: Sequence[str], tokenizer: "PreTrainedTokenizerBase", settings: DataSection
) -> dict[tuple[int, ...], int]:
    """Return the target tokens of every label word that occurs -> its class number, in ascending order of the tokens.

    Raises:
        UserError: for a word without a token of its own, and two words that are the same tokens.
    """
    closing, numbers = ends_of(tokenizer, settings).closing, {word: number for number, word in enumerate(classes)}
    found: dict[tuple[int, ...], int] = {}
    for sample in samples:
        word, tokens = str(sample.label), tuple(sample.tokens[sample.targets].tolist())
        if not set(tokens) - closing:
            raise UserError(
                f"The label word {word!r} has no token of its own in this tokenizer, so it cannot be learnt: choose "
                "another word in data.labels, or train a head: task=classification."
            )
        if found.setdefault(tokens, numbers[word]) != numbers[word]:
            raise UserError(
                f"The label words {word!r} and {classes[found[tokens]]!r} are the same tokens in this tokenizer: "
                "choose others in data.labels, or train a head: task=classification."
            )
    return dict(sorted(found.items()))
