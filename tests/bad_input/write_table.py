"""Write docs/bad_input.md: every wrong input is tried once, and what came is written down.

python -m tests.bad_input.write_table
"""

import os
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


def page() -> str:
    """Try all cases and return the page."""
    lines = [HEAD, f"{sum(map(len, GROUPS.values()))} cases.\n"]
    for group, cases in GROUPS.items():
        lines += [f"## {group[0].upper()}{group[1:]}\n", "| case | expected | seen |", "|---|---|---|"]
        for name, case in cases.items():
            with tempfile.TemporaryDirectory() as folder:
                lines.append(row(name, case.says, outcome(case, Path(folder))))
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(GLORA_CACHE=cache, HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")
        PAGE.write_text(page(), encoding="utf-8")
