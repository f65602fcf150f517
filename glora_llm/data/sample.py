"""The tokens of one sample, and which of them are learnt."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Mask = NDArray[np.bool_]
ByteCounts = NDArray[np.int64]


@dataclass(frozen=True)
class OptionSpans:
    """The token positions of the options of a multiple-choice sample.

    Attributes:
        starts: index of the first token of each option's sequence.
        lengths: characters of each option.
        right: number of the right option, from 0.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    right: int


@dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes:
        tokens: (T) token ids.
        targets: (T) True where the token is learnt; never at the first token.
        options: of held-out multiple choice, whose sample is a sequence for each option, end to end.
        label: of a classification the word, of a regression the number, else None.
        text_bytes: (T) UTF-8 bytes of the raw text that each token stands for, of held-out running text; else None.
    """

    tokens: Tokens
    targets: Mask
    options: OptionSpans | None = None
    label: str | float | None = None
    text_bytes: ByteCounts | None = None

    @property
    def length(self) -> int:
        """The tokens of the sample, or of its longest option: what data.max_tokens limits."""
        if self.options is None:
            return len(self.tokens)
        return int(np.diff([*self.options.starts, len(self.tokens)]).max())
