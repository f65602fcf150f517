"""Before training: a wrong word is answered at once, all that is wrong together, and what matters is shown."""

import shutil
import time
from pathlib import Path

import pytest

from glora_llm.cli import main
from glora_llm.models.embedded import embedded_folder
from tests.in_process import alone  # noqa: F401 - a fixture
from tests.plan.local_recipes import rows_of
from tests.slow_imports import run_probed

WRONG = [
    "model.name_or_path=./absent", "adapter.method=lorra", "adapter.slots=null", "training.deepspeed=zero7",
    "adapter.weights=nowhere", "output.dir=model.yaml/run", "data.source=rows.jsonl",
]  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with 40 records of instructions."""
    monkeypatch.chdir(tmp_path)
    return Path(rows_of("alpaca", 40, tmp_path / "mine.jsonl"))


def dry(*more: str) -> int:
    given = ["data.source=mine.jsonl", "data.format=alpaca", "data.prompt=null", "data.validation=4"]
    given += ["data.test=null", "data.max_tokens=256", "data.overlong=error", "data.max_rows=null"]
    return main(["train", "--recipe", "tiny_cpu", "--dry-run", *given, *more])


def test_wrong_names_and_paths_are_answered_at_once_and_together(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").touch()
    began = time.monotonic()
    done, loaded, seconds = run_probed("train", "--recipe", "tiny_cpu", *WRONG, cwd=tmp_path)
    assert time.monotonic() - began < 5  # a loaded machine; the processor's own time is below
    assert done.returncode == 2 and loaded <= {"numpy"} and seconds < 1, done.stderr
    assert "6 things are wrong:" in done.stderr
    for number, said in enumerate(
        [
            "model.name_or_path './absent' does not exist",
            "rows.jsonl",
            "adapter.method 'lorra' is unknown. Did you mean 'lora'?",
            "adapter.weights: there is no nowhere",
            "No DeepSpeed configuration 'zero7'",
            "model.yaml is a file, and a folder is expected there",
        ],
        1,
    ):
        line = next(line for line in done.stderr.splitlines() if line.startswith(f"{number}. "))
        assert said in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.yaml"]


@pytest.mark.parametrize("model", ["embedded:tiny-llama", "base"])
def test_a_wrong_target_is_answered_at_once(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(embedded_folder("tiny-llama"), tmp_path / "base")
    changes = [f"model.name_or_path={model}", "adapter.targets=[q_proj, v_prj]"]
    done, loaded, _ = run_probed("train", "--recipe", "tiny_cpu", *changes, cwd=tmp_path)
    assert done.returncode == 2 and loaded <= {"numpy"}, done.stderr
    assert (
        "'v_prj' matches no module. Did you mean 'v_proj'? Linears of this model: down_proj, gate_proj" in done.stderr
    )


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; expected a number from 1 on"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 of WORLD_SIZE=2 processes"),
        ({"RANK": "-1"}, "RANK is '-1'"),
    ],
)
def test_numbers_that_no_launcher_gives(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--recipe", "tiny_cpu"]) == 2
    assert said in capsys.readouterr().err


def test_what_is_wrong_with_data_and_model_is_said_together(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry("data.max_tokens=4", "adapter.paths={query: {B: lora}}") == 2
    said = capsys.readouterr().err
    assert "2 things are wrong:" in said
    assert "longer than data.max_tokens" in said and "adapter.paths 'query' matches none of the 14" in said


def test_the_dry_run_shows_what_matters(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry("adapter.targets=q_proj", "training.steps=60", "training.global_batch=16") == 0
    out = capsys.readouterr().out
    assert "layers     2 adapted: q_proj 2" in out
    assert "weights    0.4 MB in safetensors files, whole" in out
    assert "attention segments" in out
    assert "warning    60 steps go over the 36 training samples" in out and "times; an adapter" in out
    assert "sample 1   label tokens marked: " in out and "«" in out


def test_a_context_that_is_too_short_is_a_warning(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry("data.max_tokens=100000") == 0
    assert "warning    data.max_tokens is 100,000, and the model was made for" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "missing", "empty"])
def test_weights_must_be_whole(damage: str, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(embedded_folder("tiny-llama"), "base")
    weights = Path("base/model.safetensors")
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:1000] if damage == "cut" else b"")
    assert dry("model.name_or_path=base") == 2
    said = capsys.readouterr().err
    assert "holds no weights" in said if damage == "missing" else "is damaged or cut off" in said
