"""scripts/measure_code.py on a small package made here, and on this one."""

import ast
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "measure_code.py"))


def package(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = folder / "pkg" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder / "pkg"


def test_a_small_package(script: dict[str, Any], tmp_path: Path) -> None:
    made = package(
        tmp_path,
        {
            "__init__.py": "",
            "root.py": "def one():\n    return 1\n",
            "a/x.py": "from pkg.b import y\n",
            "b/y.py": "def f():\n    from ..a.x import z\n    return z\n",
            "tests/test_x.py": "import pkg.a.x\n",
            "broken.py": "def (",
        },
    )
    measured = script["measure"](made)
    assert sorted(measured.files) == [0, 1, 2, 3]  # neither the test nor the file that is no Python
    assert [length for length, _ in measured.functions] == [3, 2]
    assert measured.mutual_imports == [("a", "b")]
    assert measured.root_modules == 1
    assert measured.nodes_per_line == pytest.approx((3 + 1 + 3 + 1) / 6)
    with pytest.raises(SystemExit, match="circle: a, b"):
        script["floors"]({("a", "b"), ("b", "a")})
    with pytest.raises(SystemExit, match="holds no Python module"):
        script["measure"](tmp_path / "nowhere")


def test_this_package_stands_on_floors(script: dict[str, Any]) -> None:
    trees: dict[Path, ast.Module] = script["parse"](ROOT / "glora_llm")
    edges = script["imports_between_units"](ROOT / "glora_llm", trees)
    floor = script["floors"](edges)
    assert floor["errors"] == 0 < floor["schema"] < floor["plan"] < floor["run"] < floor["cli"]
    assert all(floor[above] > floor[below] for above, below in edges)
