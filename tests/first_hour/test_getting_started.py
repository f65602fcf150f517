"""Every command of docs/getting_started.md does what the page says: the page is parsed, and its commands are run."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from glora_llm import recipe
from glora_llm.cli import main
from glora_llm.cli.main import command_parser
from tests.in_process import alone, train_in_process  # noqa: F401 - a fixture
from tests.plan.local_recipes import rows_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "getting_started.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line.strip()]
# what a test changes: a tiny base, two steps
SMALL = [
    "model.name_or_path=embedded:tiny-llama", "training.steps=2", "training.warmup=0", "data.max_tokens=256",
    "evaluation.every=2", "output.save_every=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with `mine.jsonl`, 40 records of instructions."""
    made = tmp_path_factory.mktemp("hour")
    rows_of("alpaca", 40, made / "mine.jsonl")
    (made / "recipes").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        yield made


def run(command: list[str]) -> int:
    """Run one command of the page, where the tiny model and two steps are enough."""
    if command[0] == "make":
        return subprocess.run(["make", "-n", *command[1:]], cwd=ROOT, check=False, capture_output=True).returncode
    if command[0] == "source":
        return int(command[1] != ".venv/bin/activate")
    if command[:2] == ["deepspeed", "train.py"]:
        return train_in_process(command[command.index("--recipe") + 1], *command[4:], *SMALL)
    assert command[0] == "glora-llm", f"no rule for '{command[0]}'"
    if command[1] == "watch":  # a server until it is ended: tests/cli/test_watch.py
        return int(command_parser().parse_args(command[1:]).command is None)
    if command[1] == "train" and "--dry-run" not in command:
        return train_in_process(command[3], *command[4:], *SMALL)
    return main(command[1:])


def test_every_command_runs_in_the_order_of_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(COMMANDS) > 15
    for line in COMMANDS:
        words = shlex.split(line, comments=True)
        target = words[words.index(">") + 1] if ">" in words else None
        capsys.readouterr()
        assert run(words[: words.index(">")] if target else words) == 0, f"{line}\n{capsys.readouterr().err}"
        if target:
            Path(target).write_text(capsys.readouterr().out)
    assert recipe.load("recipes/copy.yaml").data.source == "mine.jsonl"
    assert Path("merged/config.json").is_file()
    [code] = [text for kind, text in BLOCKS if kind == "python"]
    exec(code, {})


def test_the_smallest_recipe_is_complete(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [text] = [text for kind, text in BLOCKS if kind == "yaml"]
    assert set(yaml.safe_load(text)) == {"model", "adapter", "data", "training", "output"}
    Path("smallest.yaml").write_text(text)
    changed = ["model.name_or_path=embedded:tiny-llama", "output.dir=runs/smallest"]
    assert main(["train", "--recipe", "smallest.yaml", "--dry-run", *changed]) == 0


def test_the_lines_of_a_dry_run_are_those_of_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [shown] = [text for kind, text in BLOCKS if not kind and text.startswith("model ")]
    assert main(["train", "--recipe", "tiny_cpu", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(shown)
