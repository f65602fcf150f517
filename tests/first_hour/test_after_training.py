"""A run that has ended: its adapter damaged or gone, its checkpoints deleted, trained on, scored at a step."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glora_llm import recipe as recipes
from glora_llm.cli import main
from glora_llm.launch import ranks
from glora_llm.plan.run_folder import RunFolder
from glora_llm.run import train as run_module
from tests.in_process import alone, forget_launch, one_thread, train_in_process
from tests.written_records import write_questions

__all__ = ["alone", "one_thread"]
WEIGHTS = "adapter_model.safetensors"


def settings(data: Path, out: Path) -> list[str]:
    return [
        f"data.source={data}", "data.format=prompt_completion", "data.prompt=null", "data.validation=4", "data.test=4",
        "data.max_rows=null", "data.max_test_rows=null", "data.max_tokens=64", "training.global_batch=2",
        "training.micro_batch=2", "training.steps=2", "training.warmup=0", "adapter.rank=2", "output.save_every=1",
        f"output.dir={out}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps, with a checkpoint of each."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert train_in_process("tiny_cpu", *settings(data, out)) == 0
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, whose recipe names the copy."""
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / "recipe.yaml"
    file.write_text(file.read_text().replace(str(trained), str(tmp_path / "run")))
    return tmp_path / "run"


def again(data: Path, run: Path, *more: str) -> int:
    """Give the command of the run again."""
    return train_in_process("tiny_cpu", *settings(data, run), *more)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def remove(file: Path) -> None:
    file.unlink()


DAMAGE = [
    (flip, WEIGHTS, f"{WEIGHTS} differs from what was written (sha256)"),
    (cut, WEIGHTS, "bytes, "),
    (remove, WEIGHTS, f"{WEIGHTS} is missing"),
    (flip, "adapter_config.json", "adapter_config.json differs"),
]


@pytest.mark.parametrize(("damage", "name", "said"), DAMAGE)
def test_a_damaged_adapter_is_named_and_written_anew(
    damage: Callable[[Path], None], name: str, said: str, run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "adapter" / WEIGHTS).read_bytes()
    damage(run / "adapter" / name)
    for command in (["evaluate", str(run)], ["merge", str(run), "--out", str(run.parent / "merged")]):
        assert main(command) == 2
        message = capsys.readouterr().err
        assert message.count("error: ") == 1 and str(run / "adapter") in message and said in message
        assert (
            "start the same training command again: it writes the folder anew from the checkpoint of step 2" in message
        )
    assert not (run.parent / "merged").exists()
    assert again(data, run) == 0
    assert (run / "adapter" / WEIGHTS).read_bytes() == before
    assert main(["evaluate", str(run)]) == 0


def test_an_adapter_without_a_manifest_is_read(run: Path) -> None:
    (run / "adapter" / "manifest.json").unlink()
    assert main(["evaluate", str(run)]) == 0


def test_an_adapter_that_is_gone(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "adapter")
    assert main(["evaluate", str(run)]) == 2
    assert "To get it back, start the same training command again" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    for command in (lambda: main(["evaluate", str(run)]), lambda: again(data, run)):
        assert command() == 2
        message = capsys.readouterr().err
        assert "no whole checkpoint is left in" in message and f"delete {run}, and give the same command" in message
    assert not (run / "adapter").exists()


@pytest.mark.parametrize("left", [[], ["step-1"]], ids=["none", "an older one"])
def test_a_finished_run_without_its_checkpoints_trains_nothing(
    left: list[str], run: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (run / "checkpoints").iterdir():
        if folder.name not in left:
            shutil.rmtree(folder)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != "recipe.yaml"}
    monkeypatch.setattr(run_module, "build", lambda *_: pytest.fail("something is trained"))
    assert again(data, run) == 0
    assert "training had ended already, after step 2" in capsys.readouterr().out
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file in before}


def test_a_checkpoint_is_scored_by_its_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file.name: file.read_bytes() for file in (run / "adapter").iterdir()}
    scores = {}
    for step in (None, 2, 1):
        assert main(["evaluate", str(run), *([] if step is None else ["--step", str(step)])]) == 0
        scores[step] = capsys.readouterr().out
    assert scores[None] == scores[2] != scores[1] and "test/loss" in scores[1]
    assert main(["evaluate", str(run), "--step", "7"]) == 2
    assert "has no checkpoint of step 7; kept: 2, 1." in capsys.readouterr().err
    assert before == {file.name: file.read_bytes() for file in (run / "adapter").iterdir()}


def offered(message: str) -> list[str]:
    """Return the arguments of the command that a refusal names."""
    found = re.search(r"glora-llm (train --recipe .*)", message)
    assert found, message
    return shlex.split(found[1])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["training.steps=5"], "training.steps=3"),
        (["training.lr=0.5", "training.schedule=constant"], "training.lr=0.5"),
        (["data.source=OTHER"], "data.source="),
    ],
)
def test_the_refusal_names_the_command_that_trains_on(
    more: list[str], said: str, run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run.parent / "other rows.jsonl"
    other.write_text(data.read_text().replace("What", "Which"))
    assert again(data, run, *(text.replace("OTHER", str(other)) for text in more)) == 2
    message = capsys.readouterr().err
    arguments = offered(message)
    assert any(argument.startswith(said) for argument in arguments) and f"output.dir={run}-2" in arguments
    try:
        assert main([*arguments, "training.steps=1"]) == 0
    finally:
        ranks.stop()
        forget_launch()
    assert (Path(f"{run}-2") / "adapter" / WEIGHTS).is_file()


def test_another_adapter_is_another_run(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert again(data, run, "adapter.rank=4") == 2
    message = capsys.readouterr().err
    assert "Choose another output.dir" in message and "glora-llm train" not in message


def test_a_damaged_start_is_refused(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run / "adapter" / WEIGHTS)
    assert again(data, run.with_name("new"), f"adapter.weights={run / 'adapter'}") == 2
    assert f"adapter.weights: {run / 'adapter'} is damaged: {WEIGHTS} differs" in capsys.readouterr().err


def test_the_start_of_another_base_is_refused(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = json.loads((run / "base.json").read_text())
    (run / "base.json").write_text(json.dumps(written | {"name": "another/base", "fingerprint": "0"}))
    for start in ("adapter", "checkpoints/step-1/adapter"):
        assert again(data, run.with_name("new"), f"adapter.weights={run / start}") == 2
        assert "was trained on another/base, and this recipe has another base" in capsys.readouterr().err
    assert not run.with_name("new").exists()


def test_the_commands_of_the_page_train_on(run: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "resume_and_merge.md").read_text(encoding="utf-8")
    found = re.search(r"### Train on from an adapter\n.*?```bash\n(.*?)```", page, re.DOTALL)
    assert found
    commands = [shlex.split(line) for line in found[1].replace("step-100", "step-1").splitlines()]
    assert len(commands) == 4
    monkeypatch.chdir(run.parent)
    run.rename("RUN")
    Path("OTHER.jsonl").write_text(data.read_text().replace("What", "Which"))
    for _, *arguments in commands:
        try:
            assert main([*arguments, "training.steps=1"] if arguments[0] == "train" else arguments) == 0, arguments
        finally:
            ranks.stop()
            forget_launch()
    assert all((Path(name) / "adapter" / WEIGHTS).is_file() for name in ("RUN-longer", "RUN-other", "RUN-100"))
    assert Path("RUN-longer/merged/config.json").is_file()


METHODS: dict[str, list[str]] = {
    "glora": [],
    "lora": ["adapter.method=lora", "adapter.slots=null"],
    "dora": ["adapter.method=dora", "adapter.slots=null"],
    "rslora": ["adapter.method=rslora", "adapter.slots=null"],
    "ia3": ["adapter.method=ia3", "adapter.slots=null"],
    "glora, head in full": ["adapter.modules_to_save=[lm_head]"],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("deepspeed", ["zero0", "zero3"])
def test_an_adapter_is_trained_on(method: str, deepspeed: str, data: Path, tmp_path: Path) -> None:
    """A step with a learning rate of zero leaves what it began with: the adapter of the run before, in every method."""
    first, second = tmp_path / "first", tmp_path / "second"
    shared = [*METHODS[method], f"training.deepspeed={deepspeed}", "training.steps=1"]
    assert again(data, first, *shared) == 0
    assert again(data, second, *shared, f"adapter.weights={first / 'adapter'}", "training.lr=1e-30") == 0
    got, expected = (load_file(folder / "adapter" / WEIGHTS) for folder in (second, first))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-7)


def test_the_recipe_of_the_command_is_the_run_s(run: Path, data: Path) -> None:
    """Values are written so that a shell and YAML read them back."""
    folder = RunFolder(run)
    changed = recipes.load("tiny_cpu", [*settings(data, run), "data.system=\"it's 'odd': {a}\"", "training.lr=1e-05"])
    with pytest.raises(Exception, match="To train on") as caught:
        folder.require_same_run(changed)
    arguments: list[Any] = offered(str(caught.value))
    found = recipes.load(arguments[2], arguments[3:])
    assert found.data.system == "it's 'odd': {a}" and found.training.lr == 1e-05
    assert found.adapter.weights == str(run / "adapter")
