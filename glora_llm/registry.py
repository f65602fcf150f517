"""Names in a recipe -> code. A registry fails on a duplicate and lists what there is on an unknown name."""

from collections.abc import Callable
from typing import Generic, TypeVar

from glora_llm.errors import UserError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named things of one kind.

    Args:
        kind: what the entries are, in the words of the error messages (`data format`).
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that stores its argument under `name`.

        Raises:
            ValueError: when the name is taken.
        """

        def store(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._entries[name] = entry
            return entry

        return store

    def get(self, name: str) -> T:
        """Return the entry called `name`.

        Raises:
            UserError: when there is none; the message lists what there is.
        """
        if name not in self._entries:
            known = ", ".join(self.names())
            raise UserError(f"Unknown {self.kind} '{name}'; there is: {known}.{nearest(name, self._entries)}")
        return self._entries[name]

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._entries)
