"""From three files that the project does not know to merged models, each step by one command that works at once."""

from pathlib import Path

import pytest

from glora_llm import recipe
from glora_llm.cli import main
from tests.first_hour.make_data import make
from tests.in_process import alone, train_in_process  # noqa: F401 - a fixture

FORMATS = {"support.jsonl": "chat", "reviews.csv": "classification", "sums.parquet": "prompt_completion"}


@pytest.mark.parametrize("name", FORMATS)
def test_init_dry_run_train_evaluate_merge(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    stem = name.partition(".")[0]
    assert main(["init", name, "--base", "embedded:tiny-llama"]) == 0
    assert recipe.load(f"{stem}.yaml").data.format == FORMATS[name]
    assert main(["train", "--recipe", f"{stem}.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("«") >= 3 and "57 rows read" in shown
    assert train_in_process(f"{stem}.yaml", "training.steps=2", "training.warmup=0", "evaluation.every=2") == 0
    assert "validation/loss" in capsys.readouterr().out
    assert main(["evaluate", f"runs/{stem}", "--split", "validation"]) == 0
    assert main(["evaluate", f"runs/{stem}", "--split", "validation", "--merged", f"runs/{stem}/merged"]) == 0
    assert (Path("runs") / stem / "merged" / "model.safetensors").is_file()
