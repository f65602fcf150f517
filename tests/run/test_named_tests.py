"""Several named test sets: each is scored after training, by `evaluate`, and of the merged model."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from glora_llm.cli import main
from tests.data.conftest import picture
from tests.in_process import alone, one_thread, train_in_process

__all__ = ["alone", "one_thread"]
SMALL = [
    "data.max_rows=64", "data.max_test_rows=24", "data.validation=16", "training.steps=2", "training.global_batch=16",
    "training.micro_batch=16", "training.warmup=0", "evaluation.every=null", "evaluation.test_before=true",
]  # fmt: skip


@pytest.fixture
def sketch(tmp_path: Path) -> Path:
    """Images of two of the six classes."""
    for n in range(8):
        place = tmp_path / "sketch" / ("disc", "frame")[n % 2]
        place.mkdir(parents=True, exist_ok=True)
        picture(n, (16, 16)).save(place / f"{n}.png")
    return tmp_path / "sketch"


def test_every_test_set_of_images_is_scored(sketch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    named = f"data.test={{shapes: test, sketch: {sketch}}}"
    assert train_in_process("vit_cifar10_vlora_tiny", *SMALL, named, f"output.dir={out}") == 0
    printed = capsys.readouterr().out
    assert "data       test/sketch: 8 rows read; 8 images" in printed
    summary = json.loads((out / "summary.json").read_text())
    names = {
        f"test/{place}/{score}" for place in ("shapes", "sketch") for score in ("loss", "accuracy", "top5_accuracy")
    }
    for part in ("test", "test_before", "test_merged"):
        assert set(summary[part]) == names
    assert "sketch/accuracy " in printed and "shapes/accuracy " in printed
    board = EventAccumulator(str(out / "tensorboard" / "test")).Reload()
    shown = board.Scalars("validation/sketch/accuracy")[-1].value
    assert shown == pytest.approx(summary["test"]["test/sketch/accuracy"])
    assert main(["evaluate", str(out)]) == 0
    scored = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("test/"))
    assert set(scored) == names
    assert float(scored["test/sketch/loss"]) == pytest.approx(summary["test"]["test/sketch/loss"], abs=1e-4)
    assert main(["evaluate", str(out), f"data.test={{again: {sketch}}}"]) == 0
    assert "test/again/accuracy" in capsys.readouterr().out
    assert main(["evaluate", str(out), "data.images.own_classes=true", f"data.test={{again: {sketch}}}"]) == 0
    own = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("test/"))
    assert float(own["test/again/loss"]) < float(scored["test/sketch/loss"]), "two classes compete, not six"
    assert float(own["test/again/top5_accuracy"]) == 1


def test_text_has_named_test_sets_too(tmp_path: Path) -> None:
    words = ["card arrival", "lost card", "top up"]
    for name, count, kinds in (("train", 60, 3), ("dialect", 8, 2)):
        rows = [{"text": f"where is card {n}", "category": words[n % kinds]} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [
        f"data.source={tmp_path / 'train.jsonl'}",
        f"data.test={{own: 5.jsonl, dialect: {tmp_path / 'dialect.jsonl'}}}",
    ]
    more[1] = more[1].replace("5.jsonl", str(tmp_path / "train.jsonl"))
    more += ["data.columns={label: category}", "data.max_rows=null", "data.shots=4", "data.validation=6"]
    out = tmp_path / "run"
    assert train_in_process("tiny_cpu", *more, "training.steps=2", "training.warmup=0", f"output.dir={out}") == 0
    found = json.loads((out / "summary.json").read_text())["test"]
    assert {"test/own/label_accuracy", "test/dialect/label_accuracy", "test/dialect/loss"} <= set(found)
