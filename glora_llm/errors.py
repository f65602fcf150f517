"""The two exceptions that a user may cause, and how names are suggested."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: the message says what was got, what was expected and what to do. Entry points exit with code 2."""


class CheckFailed(Exception):
    """A result is outside its bound (a merge that is not exact, say). Entry points exit with code 1."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest of `known`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
