"""A head on two processes under ZeRO 3 learns and scores what one process does under ZeRO 0."""

import json
from pathlib import Path

import pytest

from tests.training.launching import finished, launch, metrics

# Two launches: `make test-reliability` runs them.
pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.reliability]
WORDS = ("lost", "found", "late")


def test_stages_and_processes_change_nothing(tmp_path: Path, cache: Path) -> None:
    rows = [{"text": f"{n}: {WORDS[n % 3]}", "label": n % 3} for n in range(96)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [
        "task=classification", f"data.source={tmp_path / 'rows.jsonl'}", "data.labels=[a, b, c]", "data.validation=15",
        "data.test=17", "data.max_rows=null", "data.max_test_rows=null", "data.prompt='Card {text}.'",
        "training.steps=8", "training.warmup=0", "evaluation.metrics=[accuracy, f1, matthews_correlation]",
    ]  # fmt: skip
    for name, ranks in (("zero0", 1), ("zero3", 2)):
        where = [f"training.deepspeed={name}", f"output.dir={tmp_path / name}"]
        done = finished(launch("train.py", "--recipe", "tiny_cpu", *changes, *where, ranks=ranks))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    one, two = (tmp_path / name for name in ("zero0", "zero3"))
    assert len(metrics(one, "train/loss")) == 8
    for key in ("train/loss", "train/grad_norm", "validation/loss"):
        assert metrics(two, key) == pytest.approx(metrics(one, key), rel=2e-5), key
    scores = [json.loads((run / "summary.json").read_text())["test"] for run in (one, two)]
    assert set(scores[0]) == {"test/loss", "test/accuracy", "test/f1", "test/matthews_correlation"}
    assert scores[1] == pytest.approx(scores[0], rel=2e-5)
