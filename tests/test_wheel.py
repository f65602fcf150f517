"""The package that is built holds what a checkout holds: recipes, DeepSpeed's files and the data set."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def files_in(folder: str, pattern: str) -> set[str]:
    return {file.name for file in (ROOT / folder).glob(pattern)}


def test_pyproject_lists_every_folder_of_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "glora_llm").rglob("__init__.py")}
    assert folders
    assert set(settings["packages"]) == folders | set(settings["package-dir"])


@pytest.mark.slow
def test_the_wheel_is_complete_and_finds_its_recipes(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: building leaves folders behind
    for name in ("glora_llm", "recipes", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*ROOT.glob("*.md"), ROOT / "pyproject.toml", ROOT / "LICENSE"]:
        shutil.copy(file, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True, timeout=300)
    [wheel] = tmp_path.glob("glora_llm-*.whl")

    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern, place in (
        ("recipes", "*.yaml", "recipes"),
        ("recipes/paper", "*.yaml", "recipes/paper"),
        ("ds_configs", "*.json", "ds_configs"),
        ("glora_llm/data/banking77", "*", "data/banking77"),
        ("glora_llm/data/gsm8k", "*", "data/gsm8k"),
        ("glora_llm/data/gsm8k_chat", "*", "data/gsm8k_chat"),
    ):
        expected = {f"glora_llm/{place}/{name}" for name in files_in(folder, pattern)}
        assert expected
        assert expected <= inside
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "glora_llm").rglob("*.py")}
    assert modules <= inside

    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    listing = subprocess.run(
        [sys.executable, "-m", "glora_llm", "recipes"],
        cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = {line.split()[0] for line in listing.stdout.splitlines()}
    files = (file.relative_to(ROOT / "recipes") for file in (ROOT / "recipes").rglob("*.yaml"))
    assert names == {file.with_suffix("").as_posix() for file in files}
