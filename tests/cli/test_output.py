"""A locale that is not UTF-8; standard output or error closed or full: always a message and the right exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_input.case import RECIPE
from tests.written_records import write_questions

ROOT = Path(__file__).parents[2]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
WRONG = ("train", "--recipe", "recipe.yaml", "training.lrr=«1»")
FULL = "No space left on device: standard output. Free some space, and start again."


def said(folder: Path, *words: str, shell: str = "", **variables: str) -> tuple[int, str, str]:
    """Return exit code, output and errors of `glora-llm WORDS`, in a shell that redirects as `shell` says."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | variables
    command = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-m", "glora_llm", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=600, check=False)
    return done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe with signs that ASCII has not, in its text, its path and its records."""
    rows = write_questions(tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(rows.replace("What", "«Où»"), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(f"description: «é»\n{RECIPE}", encoding="utf-8")
    return tmp_path


def test_a_locale_without_those_signs(folder: Path) -> None:
    code, _, error = said(folder, *WRONG, **ASCII)
    assert code == 2 and error.startswith("error: command line, training.lrr=\\xab1\\xbb: unknown key"), error
    words = ("train", "--recipe", "recipe.yaml", "data.prompt=¿{prompt}", "--dry-run")
    code, output, error = said(folder, *words, **ASCII)
    assert code == 0 and "\\xbf\\xabO\\xf9\\xbb is" in output and "Traceback" not in error, output + error


@pytest.mark.parametrize(
    ("words", "shell", "code", "output", "error"),
    [
        (("recipes",), ">&-", 0, "", ""),
        (("recipes",), ">/dev/full", 2, "", FULL),
        (("recipes",), "<&-", 0, "tiny_cpu", ""),
        (WRONG, "2>&-", 2, "unknown key 'training.lrr'", ""),
        (WRONG, "2>/dev/full", 2, "", ""),
        (WRONG, ">&- 2>&-", 2, "", ""),
    ],
    ids=lambda value: value if isinstance(value, str) and value[:1] in "<>2" else "",
)  # fmt: skip
def test_closed_and_full_outputs(
    folder: Path, words: tuple[str, ...], shell: str, code: int, output: str, error: str
) -> None:
    found, printed, complained = said(folder, *words, shell=shell)
    assert found == code and output in printed and error in complained, printed + complained
    assert "Traceback" not in complained
