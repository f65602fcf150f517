"""Measure how a Python package is laid out: sizes of functions and files, density, imports between its folders.

    python scripts/measure_code.py                               # this package
    python scripts/measure_code.py glora_llm PATH/TO/torchtune   # several, one row each
    python scripts/measure_code.py --longest 10                  # its ten longest functions too
    python scripts/measure_code.py --floors docs/figures/floors.svg    # a picture: who imports whom

Everything is read from the source by `ast`; nothing is imported. Tests, documents and generated files do not count.
"""

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {"tests", "test", "__pycache__", ".git", "build", "docs"}
FUNCTION_BUDGET, FILE_BUDGET = 40, 300  # lines: docs/architecture.md, house rules

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Measured:
    """Measurements of one package.

    Args:
        name: of the package's folder.
        files: lines of each module.
        functions: (lines, "file:line name") of each function and method.
        nodes_per_line: syntax-tree nodes divided by lines that hold code: how much a reader meets on a line.
        mutual_imports: pairs of folders (or root modules) that import each other.
        root_modules: modules directly in the package's folder, without `__init__` and `__main__`.
    """

    name: str
    files: list[int]
    functions: list[tuple[int, str]]
    nodes_per_line: float
    mutual_imports: list[tuple[str, str]]
    root_modules: int


def parse(package: Path) -> dict[Path, ast.Module]:
    """Return the syntax trees of the package's modules, without its tests; a file that is no Python is named and left.

    Raises:
        SystemExit: when the folder holds no Python module.
    """
    trees = {}
    for file in sorted(package.rglob("*.py")):
        if SKIPPED & set(file.relative_to(package).parts):
            continue
        try:
            trees[file] = ast.parse(file.read_text(encoding="utf-8"))
        except SyntaxError as error:
            print(f"left out, no valid Python: {file}, line {error.lineno}", file=sys.stderr)
    if not trees:
        raise SystemExit(f"error: {package} holds no Python module; give the folder of a package.")
    return trees


def measure(package: Path) -> Measured:
    """Measure one package folder."""
    trees = parse(package)
    functions, nodes, code_lines = [], 0, set()
    for file, tree in trees.items():
        for node in ast.walk(tree):
            nodes += isinstance(node, ast.expr | ast.stmt)
            if hasattr(node, "lineno"):
                code_lines.add((file, node.lineno))
            if isinstance(node, Function):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                functions.append((length, f"{file.relative_to(package.parent)}:{node.lineno} {node.name}"))
    return Measured(
        package.name,
        [len(file.read_text(encoding="utf-8").splitlines()) for file in trees],
        sorted(functions, reverse=True),
        nodes / len(code_lines),
        mutual_imports(package, trees),
        sum(file.parent == package and file.stem not in ("__init__", "__main__") for file in trees),
    )


def mutual_imports(package: Path, trees: Mapping[Path, ast.Module]) -> list[tuple[str, str]]:
    """Return the pairs of units (folders or modules of the package's root) that import each other."""
    edges = imports_between_units(package, trees)
    return sorted((a, b) for a, b in edges if a < b and (b, a) in edges)


def imports_between_units(package: Path, trees: Mapping[Path, ast.Module]) -> set[tuple[str, str]]:
    """Return (importing unit, imported unit) of all imports between units, wherever in a file they stand."""
    return {
        (_unit(package, file), unit) for file, tree in trees.items() for unit in _imported_units(package, file, tree)
    }


def floors(edges: set[tuple[str, str]]) -> dict[str, int]:
    """Return unit -> floor: 0 imports no other unit, every other one stands just above the highest that it imports.

    Raises:
        SystemExit: when units import each other in a circle.
    """
    units = {unit for edge in edges for unit in edge}
    floor: dict[str, int] = {}
    while len(floor) < len(units):
        ready = {u for u in units - floor.keys() if all(b in floor for a, b in edges if a == u)}
        if not ready:
            raise SystemExit(f"error: these import each other in a circle: {', '.join(sorted(units - floor.keys()))}")
        floor |= {u: 1 + max((floor[b] for a, b in edges if a == u), default=-1) for u in ready}
    return floor


def draw_floors(package: Path, out: Path) -> None:
    """Draw the units as boxes on their floors, and write the picture (SVG or PNG)."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": package.name}  # text stays text, the file repeats
    trees = parse(package)
    edges = {edge for edge in imports_between_units(package, trees) if not edge[0].startswith("__")}
    floor = floors(edges)
    counts = {unit: sum(_unit(package, file) == unit for file in trees) for unit in floor}
    height = max(floor.values()) + 1
    figure = Figure(figsize=(11, 0.62 * height + 0.6))
    axes = figure.subplots()
    for level in range(height):
        names = sorted(unit for unit in floor if floor[unit] == level)
        for column, name in enumerate(names):
            size = f"{counts[name]} modules" if (package / name).is_dir() else "module"
            style = {"boxstyle": "round,pad=0.35", "facecolor": "#e8eef7", "edgecolor": "#4a6fa5"}
            x = (column + 0.5) / len(names)
            axes.text(x, level, f"{name}  ({size})", ha="center", va="center", fontsize=9, bbox=style)
    axes.set(xlim=(0, 1), ylim=(-0.6, height - 0.4), xticks=[])
    axes.set_yticks(range(height), [f"floor {level}" for level in range(height)], fontsize=8)
    axes.set_title(f"{package.name}: a folder imports only from floors below its own", fontsize=10)
    axes.set_frame_on(False)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def _unit(package: Path, file: Path) -> str:
    return file.relative_to(package).parts[0].removesuffix(".py")


def _imported_units(package: Path, file: Path, tree: ast.Module) -> Iterator[str]:
    """Yield the other units that a module imports, anywhere in it."""
    own = _unit(package, file)
    parents = [package.name, *file.relative_to(package).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            inside = len(parts) > 1 and parts[0] == package.name and parts[1] != own
            if inside and ((package / parts[1]).is_dir() or (package / f"{parts[1]}.py").is_file()):
                yield parts[1]


def row(measured: Measured) -> dict[str, str]:
    """Return one package's row of the table."""
    lengths = [length for length, _ in measured.functions]
    within = sum(length <= FUNCTION_BUDGET for length in lengths) / len(lengths)
    return {
        "package": measured.name,
        "modules": str(len(measured.files)),
        "lines": f"{sum(measured.files):,}",
        "functions": f"{len(lengths):,}",
        "median": f"{median(lengths):.0f}",
        "9 in 10": f"{quantiles(lengths, n=10)[-1]:.0f}",
        f"<= {FUNCTION_BUDGET}": f"{100 * within:.0f} %",
        "longest": str(max(lengths)),
        "longest file": str(max(measured.files)),
        f"files > {FILE_BUDGET}": str(sum(length > FILE_BUDGET for length in measured.files)),
        "nodes a line": f"{measured.nodes_per_line:.1f}",
        "mutual imports": str(len(measured.mutual_imports)),
        "modules at the root": str(measured.root_modules),
    }


def print_table(rows: Sequence[dict[str, str]]) -> None:
    """Print rows as a Markdown table."""
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for values in rows:
        print("| " + " | ".join(values.values()) + " |")


def main() -> None:
    """Print the table, and the longest functions where they are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("packages", metavar="FOLDER", nargs="*", type=Path, help="package folders (default: glora_llm)")
    parser.add_argument("--longest", metavar="N", type=int, default=0, help="list the N longest functions of each")
    parser.add_argument("--floors", metavar="FILE", type=Path, help="draw the imports of the first package")
    arguments = parser.parse_args()
    packages = [package.resolve() for package in arguments.packages or [ROOT / "glora_llm"]]
    measured = [measure(package) for package in packages]
    print_table([row(item) for item in measured])
    for item in measured:
        for pair in item.mutual_imports:
            print(f"{item.name}: {pair[0]} and {pair[1]} import each other")
        for length, where in item.functions[: arguments.longest]:
            print(f"{length:4d} lines  {where}")
    if arguments.floors:
        draw_floors(packages[0], arguments.floors)


if __name__ == "__main__":
    main()
