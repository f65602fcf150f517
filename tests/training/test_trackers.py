"""Trackers get every number, go on under the same name, and never end a training."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from glora_llm.training.metric_log import MetricLog
from glora_llm.training.trackers import IDS, run_name

STAND_IN = """
import json, pathlib
class Run:
    def __init__(self, name): self.name = name
    def log(self, values, step=None):
        if "train/bad" in values: raise RuntimeError("the server is gone")
        with open({file!r}, "a") as file: file.write(json.dumps([self.name, step, values]) + "\\n")
    def finish(self): pass
def init(name=None, **_): return Run(name)
"""


@pytest.fixture
def logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package called trackio whose calls are those of trackio 0.43, and the file that it writes."""
    file = tmp_path / "logged.jsonl"
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "trackio.py").write_text(STAND_IN.format(file=str(file)))
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    before = {name: sys.modules.pop(name, None) for name in ("trackio", "wandb")}
    importlib.invalidate_caches()
    yield file
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def launch(run: Path, start: int, names: list[str], *values: float) -> None:
    """Log values as one launch does."""
    run.mkdir(exist_ok=True)
    log = MetricLog(run, start, 9, True, "tokens", names)
    log.begin({"training/lr": 0.1})
    for step, value in enumerate(values, start + 1):
        log.scalars(step, {"train/loss": value})
    log.test_scores(9, {"test/loss": 0.5})
    log.close()


def test_a_run_goes_on_under_its_name(logged: Path, tmp_path: Path) -> None:
    launch(tmp_path / "run", 0, ["trackio"], 3.0, 2.0)
    launch(tmp_path / "run", 1, ["trackio"], 2.0, 1.0)
    lines = [json.loads(line) for line in logged.read_text().splitlines()]
    (name,) = {line[0] for line in lines}
    assert name == json.loads((tmp_path / "run" / IDS).read_text())["trackio"] and name.startswith("run-")
    assert [line[1] for line in lines] == [1, 2, 9, 2, 3, 9]
    assert lines[2][2] == {"test/loss": 0.5}
    assert run_name(tmp_path / "run", "wandb") != name  # each tracker has its own
    assert run_name(tmp_path / "run", "trackio") == name


def test_a_failure_is_said_once(logged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "packages" / "wandb.py").write_text("raise ValueError('no key')")
    (tmp_path / "run").mkdir()
    log = MetricLog(tmp_path / "run", 0, 9, True, "tokens", ["wandb", "trackio"])
    log.begin({})
    log.scalars(1, {"train/bad": 1.0})
    log.scalars(2, {"train/loss": 1.0})
    log.close()
    said = capsys.readouterr().out
    assert said.count("warning: wandb failed (ValueError: no key); training goes on without it") == 1
    assert said.count("warning: trackio failed (RuntimeError: the server is gone)") == 1
    assert not logged.exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_real_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed: two launches, nothing sent anywhere, no warning."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(name)
    said: list[str] = []
    monkeypatch.setattr(MetricLog, "say", lambda _log, text: said.append(text))
    launch(tmp_path / "run", 0, [name], 3.0, 2.0)
    launch(tmp_path / "run", 1, [name], 2.0, 1.0)
    assert not [line for line in said if "warning" in line]
    kept = tmp_path / "run" / "wandb" if name == "wandb" else tmp_path / "trackio"
    assert [path for path in kept.rglob("*") if path.is_file()]
