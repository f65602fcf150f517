"""Few-shot training: the draw of N records of each class, by what they hold and a seed."""

import hashlib
from collections.abc import Sequence
from typing import Protocol, TypeVar

from glora_llm.errors import UserError


class Classed(Protocol):
    """An example of any kind: equal texts are duplicates."""

    def text(self) -> str:
        """Return all that it says, or a digest of it."""
        ...

    def class_name(self) -> str:
        """Return the name of its class; where there are no classes, any text."""
        ...


E = TypeVar("E", bound=Classed)


def draw_key(text: str, seed: int) -> str:
    """Return the place of a record in the draw of a seed: a SHA-256 of both, in hexadecimal."""
    return hashlib.sha256(f"{seed}\0{text}".encode(errors="surrogatepass")).hexdigest()


def draw_shots(examples: Sequence[E], shots: int, seed: int, classes: Sequence[str]) -> list[E]:
    """Return `shots` different examples of each class, in the order of the draw.

    A record's place in the draw depends on what it says and the seed alone, so neither the order of the records, nor
    the names of their files, nor the machine changes what is drawn; and with the same seed, more shots add to fewer.

    Args:
        classes: names of all classes.

    Raises:
        UserError: naming the class that has the fewest, where that is fewer than `shots`.
    """
    of_class: dict[str, dict[str, E]] = {name: {} for name in classes}
    for example in examples:
        of_class.setdefault(example.class_name(), {})[draw_key(example.text(), seed)] = example
    fewest = min(of_class, key=lambda name: len(of_class[name]))
    if len(of_class[fewest]) < shots:
        short = sum(len(found) < shots for found in of_class.values())
        others = f" (and {short - 1} more classes have too few)" if short > 1 else ""
        there = len(of_class[fewest])
        advice = f"Set data.shots={there} or less, hold" if there else "Take the class out of the data's classes, hold"
        raise UserError(
            f"data.shots={shots} asks for {shots} different training records of each class, and class '{fewest}' has "
            f"{there}{others}. {advice} out fewer (data.validation, data.test), or give that class more records."
        )
    chosen = {key: found[key] for found in of_class.values() for key in sorted(found)[:shots]}
    return [chosen[key] for key in sorted(chosen)]
