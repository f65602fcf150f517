"""Who may import whom, and how long things may be: read from the source, nothing is imported."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "glora_llm"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "scripts").rglob("*.py")), ROOT / "train.py"]

# Unit (a folder or a root module of the package) -> the units that it may import, from the ground floor up.
BASE = {"atomic", "errors", "failpoints", "files", "registry", "schema"}
BELOW_PLAN = BASE | {"adapters", "data", "glora", "launch", "models", "search", "tasks", "training", "vlora"}
BELOW_RUN = BELOW_PLAN | {"evaluation", "merge", "plan", "recipe", "report"}
ALLOWED = {
    "errors": set(),
    "schema": {"errors"},
    "registry": {"errors"},
    "failpoints": {"errors"},
    "atomic": {"errors", "failpoints"},
    "files": {"errors"},
    "recipe": {"errors", "files", "schema"},
    "launch": BASE,
    "glora": BASE | {"models"},
    "vlora": BASE,
    "data": BASE,
    "training": BASE | {"launch"},
    "models": BASE | {"launch", "vlora"},
    "search": BASE | {"glora"},
    "adapters": BASE | {"glora", "models", "search", "training", "vlora"},
    "tasks": BASE | {"data", "models", "training"},
    "plan": BELOW_PLAN | {"recipe"},
    "report": BASE | {"glora", "plan", "recipe", "search"},
    # Scores and merges are commands of their own: like a run, they start from a plan.
    "evaluation": BELOW_PLAN | {"plan", "report"},
    "merge": BELOW_PLAN | {"evaluation", "plan"},
    # An import writes a run folder, and reads it by the merge's own code.
    "foreign": BELOW_PLAN | {"merge", "recipe"},
    # A comparison starts runs as processes of their own, and reads their folders.
    "compare": BELOW_PLAN | {"plan", "recipe"},
    "run": BELOW_RUN,
    "cli": BELOW_RUN | {"compare", "foreign", "run"},
    "__main__": {"cli"},
}
ROOT_MODULES = {"__init__", "__main__", "atomic", "errors", "failpoints", "recipe", "registry"}
LIGHT = {
    "atomic": {"filelock"},
    "files": {"yaml"},
    "recipe": {"yaml", "pydantic"},
    "schema": {"pydantic"},
    "errors": set(),
    "failpoints": set(),
    "registry": set(),
}
NO_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
LONGEST_FILE, LONGEST_FUNCTION = 300, 80


def imported(file: Path) -> Iterator[str]:
    """Yield every module that a file imports, wherever in the file, as an absolute dotted name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = file.relative_to(ROOT).parent.parts
            package = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (package, node.module or "") if part)
            # `from glora_llm import run` imports a unit; `from glora_llm.errors import UserError` a name.
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "glora_llm" else [module]


def unit_of(file: Path) -> str:
    """Return the folder or module of the package that a file belongs to; empty for the package's own __init__."""
    part = file.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py").removeprefix("__init__")


def units_imported(file: Path) -> set[str]:
    units = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()}
    names = {name.split(".")[1] for name in imported(file) if name.startswith("glora_llm.")}
    return (names & units) - {unit_of(file)}


def edges() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for file in MODULES:
        found.setdefault(unit_of(file), set()).update(units_imported(file))
    return found


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_the_walk_found_the_package() -> None:
    assert len(MODULES) > 10
    assert "errors" in edges()["recipe"]
    command_line = {name for file in (PACKAGE / "cli").glob("*.py") for name in imported(file)}
    assert {"glora_llm.recipe", "glora_llm.__version__"} <= command_line


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_a_module_imports_only_what_its_unit_may(file: Path) -> None:
    unit = unit_of(file)
    if not unit:
        assert not units_imported(file), "importing glora_llm imports nothing"
        return
    assert unit in ALLOWED, f"new unit '{unit}': say in ALLOWED what it may import"
    forbidden = units_imported(file) - ALLOWED[unit]
    assert not forbidden, f"{unit} may import {sorted(ALLOWED[unit])}, not {sorted(forbidden)}"


def test_the_root_holds_five_modules_beside_the_entry_points() -> None:
    assert {file.stem for file in PACKAGE.glob("*.py")} == ROOT_MODULES


def test_no_two_units_import_each_other() -> None:
    graph = edges()
    for start in graph:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            unit = todo.pop()
            if unit not in seen:
                seen.add(unit)
                todo += graph.get(unit, set())
        assert start not in seen, f"{start} reaches itself through its imports"


@pytest.mark.parametrize(("unit", "third_party"), LIGHT.items(), ids=LIGHT)
def test_what_every_command_loads_is_light(unit: str, third_party: set[str]) -> None:
    files = [file for file in MODULES if unit_of(file) == unit]
    roots = {name.split(".")[0] for file in files for name in imported(file)}
    assert files
    assert roots - set(sys.stdlib_module_names) - {"glora_llm"} <= third_party


def test_scripts_and_tests_are_never_imported_by_the_package() -> None:
    for file in MODULES:
        roots = {name.split(".")[0] for name in imported(file)}
        assert not roots & {"scripts", "tests", "train"}, file


def test_train_imports_the_command_line_alone() -> None:
    assert set(imported(ROOT / "train.py")) == {"glora_llm.cli"}


def test_no_module_is_a_drawer() -> None:
    for file in SOURCES:
        assert not NO_NAMES & {*file.relative_to(ROOT).parent.parts, file.stem}, f"{file}: name it after what it does"


@pytest.mark.parametrize("file", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))], ids=name_of)
def test_files_and_functions_are_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE, f"{file.name}: {len(text.splitlines())} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            length = node.end_lineno - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name}: {length} lines"
