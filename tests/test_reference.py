"""docs/recipe_reference.md says what the schema says."""

import subprocess
import sys
from pathlib import Path

from glora_llm.schema import Recipe

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "recipe_reference.md"


def test_the_reference_is_up_to_date() -> None:
    result = subprocess.run(
        [sys.executable, "scripts/make_reference.py", "--check"],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_the_reference_has_every_section_and_key() -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    for name in Recipe.model_fields:
        assert f"## {name}\n" in text or f"| `{name}` |" in text
    assert any(
        row.startswith("| `lr` | number > 0 or `auto` | 1/step | required | peak learning rate; auto: ") for row in rows
    )
    assert "| `steps` | integer > 0 or null | steps | `null` | optimizer steps (or give epochs) |" in rows
