"""Links whose target is gone: a file of that name is there, and cannot be read."""

from pathlib import Path


def dangling(path: Path) -> str:
    """Return ` It is a link to X, which is not there.` for a link to nowhere, else an empty string."""
    return f" It is a link to {path.readlink()}, which is not there." if path.is_symlink() and not path.exists() else ""
