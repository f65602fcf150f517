"""The command line: quick, light, and every mistake of a user is one message and exit code 2."""

import argparse
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import glora_llm
from glora_llm import cli
from glora_llm.cli.main import command_parser, guarded
from glora_llm.errors import CheckFailed, UserError
from glora_llm.launch.stop import StopRequest
from glora_llm.plan.run_folder import RunFolder
from tests.slow_imports import run_probed

ROOT = Path(__file__).parents[2]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )


def command_lines(parser: argparse.ArgumentParser) -> Iterator[list[str]]:
    """Yield the words of every command of `glora-llm`, and of the actions of a command."""
    yield []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from ([name, *words] for words in command_lines(below))


@pytest.mark.parametrize("command", list(command_lines(command_parser())), ids=" ".join)
def test_help_fits_a_screen_and_teaches_by_examples(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A screen of 40 lines and 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text or "a first run" in text
    assert f"  glora-llm {' '.join(command)}" in text
    assert len(text.splitlines()) <= 40
    assert [line for line in text.splitlines() if len(line) > 100] == []


def test_help_takes_less_than_a_second_of_processor_time() -> None:
    seconds = []
    for _ in range(3):
        before = os.times()
        assert python("-m", "glora_llm", "--help").returncode == 0
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 1.0


@pytest.mark.parametrize(
    "command",
    [["--help"], ["train", "--help"], ["recipes"], ["recipes", "quickstart", "training.lr=1e-4"]],
    ids=" ".join,
)
def test_these_commands_import_nothing_heavy(command: list[str]) -> None:
    _, loaded, _ = run_probed(*command, cwd=ROOT)
    assert loaded == set()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "--recipe", "quikstart"], "error: No recipe 'quikstart'; there is: "),
        (["train", "--recipe", "quickstart", "training.lrr=1"], "Did you mean 'lr'?"),
        (["merge", "recipes", "--out", "x"], "error: recipes is no run folder"),
        (["evaluate", "nowhere"], "error: nowhere is no run folder"),
        (["search", "nowhere", "--budget", "1M"], "error: nowhere is no run folder"),
        (["recipes", "quickstart", "lr"], "is not an override"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_a_mistake_is_one_message_and_exit_code_2(command: list[str], message: str) -> None:
    result = python("-m", "glora_llm", *command)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_train_script_takes_what_the_launcher_adds() -> None:
    result = python("train.py", "--local_rank=1", "--recipe", "quikstart")
    assert result.returncode == 2
    assert "Did you mean 'quickstart'?" in result.stderr


def test_recipes_lists_names_with_descriptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert len(rows) >= 8
    assert "77 bank intents" in rows["quickstart"]


def test_recipes_prints_one_resolved(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "quickstart", "training.lr=1e-5"]) == 0
    text = capsys.readouterr().out
    assert "  lr: 1.0e-05\n" in text
    assert "  weight_decay: 0.0\n" in text


def test_recipes_lists_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "--models"]) == 0
    assert "embedded:tiny-llama" in capsys.readouterr().out


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, function: str) -> list[Any]:
    """Replace `glora_llm.MODULE.FUNCTION` by one that notes its arguments."""
    calls: list[Any] = []
    whole = ""
    for part in ["glora_llm", *module.split(".")]:
        parent, whole = whole, f"{whole}.{part}".strip(".")
        if parent:
            made = types.ModuleType(whole)
            monkeypatch.setitem(sys.modules, whole, made)
            monkeypatch.setattr(sys.modules[parent], part, made, raising=False)
    setattr(sys.modules[whole], function, lambda *given, **named: calls.append((given, named)))
    return calls


def test_train_hands_over_the_checked_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "run.train", "train")
    assert cli.main(["train", "--recipe", "quickstart", "training.lr=1e-4", "--dry-run"]) == 0
    assert cli.train_main(["--local_rank=1", "--recipe", "quickstart"]) == 0
    [((checked,), named), ((_,), plain)] = calls
    assert checked.training.lr == 1e-4
    assert isinstance(plain.pop("stop"), StopRequest)
    assert (named, plain) == ({"dry_run": True, "stop": None}, {"dry_run": False})


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text((ROOT / "recipes" / "tiny_cpu.yaml").read_text())
    return tmp_path


def test_merge_hands_over_its_options(monkeypatch: pytest.MonkeyPatch, run_folder: Path) -> None:
    calls = stand_in(monkeypatch, "merge.command", "merge_run")
    assert cli.main(["merge", str(run_folder), "--out", "a"]) == 0
    assert cli.main(["merge", str(run_folder), "--out", "b", "--to", "lora", "--dtype", "float32", "--step", "4"]) == 0
    assert cli.main(["merge", str(run_folder), "--out", "c", "--quantize", "nf4"]) == 0
    assert cli.main(["merge", str(run_folder), "--out", "d", "--genome", "g.json", "--no-compare"]) == 0
    served = ["--for", "vllm", "--without", "e, C", "--max-loss-change", "0.5"]
    assert cli.main(["merge", str(run_folder), "--out", "e", *served]) == 0
    usual: dict[str, Any] = {
        "dtype": None,
        "to": "model",
        "quantize": None,
        "step": None,
        "genome": None,
        "compared": True,
    }
    usual |= {"target": None, "without": (), "both": False, "max_loss_change": None}
    assert calls == [
        ((run_folder, Path("a")), usual),
        ((run_folder, Path("b")), usual | {"dtype": "float32", "to": "lora", "step": 4}),
        ((run_folder, Path("c")), usual | {"quantize": "nf4"}),
        ((run_folder, Path("d")), usual | {"genome": Path("g.json"), "compared": False}),
        ((run_folder, Path("e")), usual | {"target": "vllm", "without": ("C", "E"), "max_loss_change": 0.5}),
    ]


def test_evaluate_hands_over_its_options(monkeypatch: pytest.MonkeyPatch, run_folder: Path) -> None:
    calls = stand_in(monkeypatch, "evaluation.scoring", "evaluate_run")
    assert cli.main(["evaluate", str(run_folder)]) == 0
    assert cli.main(["evaluate", str(run_folder), "--split", "validation", "--merged", "m"]) == 0
    assert cli.main(["evaluate", str(run_folder), "--genome", "g.json", "data.test=a.csv"]) == 0
    assert cli.main(["evaluate", str(run_folder), "--step", "4"]) == 0
    assert [given for given, _ in calls] == [
        (RunFolder(run_folder), "test", None, None, None),
        (RunFolder(run_folder), "validation", Path("m"), None, None),
        (RunFolder(run_folder, ("data.test=a.csv",)), "test", None, Path("g.json"), None),
        (RunFolder(run_folder), "test", None, None, 4),
    ]


def test_search_hands_over_its_limits_and_overrides(monkeypatch: pytest.MonkeyPatch, run_folder: Path) -> None:
    """A limit is an override like the others, which may stand on both sides of it."""
    calls = stand_in(monkeypatch, "run.search", "search_command")
    passes, seed = "search.passes=3", "search.seed=1"
    assert cli.main(["search", str(run_folder)]) == 0
    assert cli.main(["search", str(run_folder), passes, "--budget", "1.0M,0.5M"]) == 0
    assert cli.main(["search", str(run_folder), "--budget", "8k", passes]) == 0
    assert cli.main(["search", str(run_folder), passes, "--budget", "8k", seed]) == 0
    assert [given for given, _ in calls] == [
        (run_folder, []),
        (run_folder, ["search.budget=1.0M,0.5M", passes]),
        (run_folder, ["search.budget=8k", passes]),
        (run_folder, ["search.budget=8k", passes, seed]),
    ]


@pytest.mark.parametrize(
    "command",
    [
        ["search", "runs/a", "--budgt", "8k"],
        ["search", "runs/a", "--budget", "8k", "passes"],
        ["merge", "runs/a", "--out", "b", "merge.dtype=float32"],
        ["train", "--recipe", "tiny_cpu", "training.lr=1", "--dryrun"],
    ],
    ids=" ".join,
)
def test_what_no_command_takes_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    assert stop.value.code == 2
    assert "unrecognized arguments: " in capsys.readouterr().err


def test_overrides_may_stand_before_and_behind_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "run.train", "train")
    assert cli.main(["train", "training.lr=1e-4", "--recipe", "quickstart", "training.seed=3"]) == 0
    assert cli.train_main(["training.lr=1e-4", "--recipe", "quickstart", "training.seed=3"]) == 0
    assert [(checked.training.lr, checked.training.seed) for (checked,), _ in calls] == [(1e-4, 3)] * 2


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("no such file"), 2, "error: no such file\n"),
        (CheckFailed("loss 0.3 > 0.02"), 1, "error: check failed: loss 0.3 > 0.02\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_guarded_turns_these_into_exit_codes(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def task() -> int:
        raise error

    for name in ("GLORA_LAUNCH", "LOCAL_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert guarded(task) == code
    assert capsys.readouterr().err == message


def test_guarded_leaves_defects_alone() -> None:
    def task() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        guarded(task)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"glora-llm {glora_llm.__version__}\n"
