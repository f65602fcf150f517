"""The exceptions that a user may cause, how several are told at once, and how names are suggested."""

import contextlib
import difflib
import math
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """Bad input: the message says what was got, what was expected and what to do. Entry points exit with code 2."""


class AdapterError(UserError, ValueError):
    """Bad input to the tuner itself, which users of PEFT catch as ValueError."""


class CheckFailed(Exception):
    """A result is outside its bound (a merge that is not exact, say). Entry points exit with code 1."""


class Problems:
    """Collects what checks find that do not depend on one another, so that a user reads all of it at once.

    Attributes:
        messages: in the order of the checks, each once.
    """

    def __init__(self) -> None:
        self.messages: list[str] = []

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Keep the message of a UserError that is raised inside, and go on behind the block."""
        try:
            yield
        except UserError as error:
            if str(error) not in self.messages:
                self.messages.append(str(error))

    def raise_all(self) -> None:
        """End with everything that was found.

        Raises:
            UserError: when anything was.
        """
        if len(self.messages) == 1:
            raise UserError(self.messages[0])
        if self.messages:
            listed = "\n".join(f"{number}. {text}" for number, text in enumerate(self.messages, 1))
            raise UserError(f"{len(self.messages)} things are wrong:\n{listed}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest of `known`, capitals or not, or an empty string: nothing is close."""
    plain = {other.lower(): other for other in reversed(list(known))}
    close = difflib.get_close_matches(name.lower(), list(plain), n=1, cutoff=0.5)
    return f" Did you mean '{plain[close[0]]}'?" if close else ""


def number_above_zero(text: str | None, option: str, expected: str) -> float | None:
    """Return the number that an option of the command line gives; None where it was not given.

    Args:
        expected: what it is, with its unit and an example.

    Raises:
        UserError: for text, nan, infinity, and anything not above 0.
    """
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{option} is '{text}'; expected {expected}.")
    return value


def whole_number(text: str, option: str) -> int:
    """Return the number above 0 that an option of the command line gives.

    Raises:
        UserError: when it is none, or has more than 15 digits.
    """
    if not (text.isascii() and text.isdecimal() and len(text) <= 15) or int(text) < 1:
        most = " of 15 digits at most" if len(text) > 15 else ""
        raise UserError(f"{option} is '{text[:80]}'; expected a whole number above 0{most}.")
    return int(text)
