"""Write docs/bad_input.md: every wrong input is tried once, and what came is written down.

python -m tests.bad_input.write_table [GROUP ...]

With groups (parts of their names) these alone are tried, and the others stay as the page has them.
"""

import os
import sys
import tempfile
from pathlib import Path

from tests.bad_input.case import Outcome, outcome
from tests.bad_input.tables import GROUPS

PAGE = Path(__file__).parents[2] / "docs" / "bad_input.md"
LONGEST = 150  # characters of a message in the table
HEAD = """\
# Wrong inputs, and what comes of them

One message that says what was got, what was expected and what to do; exit code 2; nothing written. A few inputs look
wrong and are right: they are accepted with exit code 0, and stand in the table with "accepted".

`tests/bad_input/test_bad_input.py` tries every line of this page in a folder of its own, and fails where another exit
code, another message, a traceback, a second message or a new file comes. `tests/bad_input/test_fuzz.py` misspells every
key of every recipe, gives every value two wrong types, and damages recipes, records, models and genomes at random.
A case is one line in a table of `tests/bad_input/`; this page is written by

```bash
python -m tests.bad_input.write_table
```

A dry run of a small recipe is the command where none is named. Messages are cut at 150 characters.
"""


def row(name: str, expected: str, seen: Outcome) -> str:
    """Return one line of the table."""
    said = seen.said.partition("error: ")[2].split("\n")
    text = said[1].strip() if len(said) > 1 and said[0].endswith(":") else said[0]
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    came = f"{seen.code}: {text}" if text else f"{seen.code}"
    return f"| {cell(name)} | {'accepted' if not expected else 2} | {cell(came)} |"


def cell(text: str) -> str:
    """Return text that a table of Markdown shows as it is."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return plain.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("`", "'")


def title(group: str) -> str:
    """Return the heading of a group."""
    return f"## {group[0].upper()}{group[1:]}"


def section(group: str) -> str:
    """Try the cases of a group and return its part of the page."""
    lines = [f"{title(group)}\n", "| case | expected | seen |", "|---|---|---|"]
    for name, case in GROUPS[group].items():
        with tempfile.TemporaryDirectory() as folder:
            lines.append(row(name, case.says, outcome(case, Path(folder))))
    return "\n".join([*lines, ""])


def page(old: str, wanted: list[str]) -> str:
    """Return the page: groups that contain one of the words (all of them without words) are tried anew.

    Args:
        old: the page as it is, whose other groups are kept.
    """
    kept = {part.partition("\n")[0]: part for part in (f"## {text}" for text in old.split("\n## ")[1:])}
    parts = [HEAD, f"{sum(map(len, GROUPS.values()))} cases.\n"]
    for group in GROUPS:
        again = not wanted or any(word in group for word in wanted)
        parts.append(section(group) if again else kept[title(group)].rstrip("\n") + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(GLORA_CACHE=cache, HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), sys.argv[1:]), encoding="utf-8")
