"""Records that several tests write."""

import json
from pathlib import Path


def write_questions(file: Path) -> Path:
    """Write twenty questions and answers, as prompt and completion."""
    rows = [{"prompt": f"What is {n} and {n + 1}?", "completion": f" It is {2 * n + 1}."} for n in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
