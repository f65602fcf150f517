"""docs/gpu.md: its computed numbers are what scripts/memory_table.py gives, and the tests that it names are there."""

import ast
import re
from pathlib import Path

from glora_llm.plan.memory import model_sizes, step_bytes
from scripts import memory_table

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


def cells(model: str, storage: str, stage: str) -> list[float]:
    """Return the numbers of one row of the page's second table."""
    (line,) = re.findall(rf"^\| {model} \| {storage} \| {stage} \| (.*) \|$", PAGE, re.MULTILINE)
    return [float(number) for number in re.findall(r"[\d.]+", line)]


def test_the_table_is_what_is_computed(tmp_path: Path) -> None:
    """One model of three; a change of a tenth of a GB means that the page is to be written again."""
    folder = memory_table.write_config("Llama-3-8B", tmp_path)
    recipe = memory_table.recipe_of("Llama-3-8B", "nf4", rows=4)
    sizes = model_sizes(recipe, folder, memory_table.DTYPE)
    step = step_bytes(recipe, folder, memory_table.DTYPE)
    for stage in ("zero2", "zero3"):
        computed = memory_table.row("Llama-3-8B", "nf4", stage, sizes, step)
        found = [float(number) for number in re.findall(r"[\d.]+", computed.split("|", 4)[4])]
        assert len(found) == 8
        assert all(abs(a - b) < 0.11 for a, b in zip(found, cells("Llama-3-8B", "nf4", stage), strict=True)), computed


def test_the_page_says_that_nothing_is_measured_before_it_says_anything_else() -> None:
    assert PAGE.splitlines()[2].startswith("**Nothing on this page has been measured on a GPU yet.**")


def test_every_test_that_it_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)
    assert len(named) > 25
    for file, function in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert not function or function in functions, f"{file}::{function}"


def test_no_finding_is_left_out() -> None:
    rows = re.findall(r"^\| (\d+[a-k]?) \|", PAGE, re.MULTILINE)
    assert rows == [*map(str, range(1, 19)), *(f"19{letter}" for letter in "abcdefghijk")]
