"""The comparison of runs: what is read of a run folder, drawn, and put into the table."""

import json
from pathlib import Path

import pytest

from glora_llm import recipe as recipes
from glora_llm.errors import UserError
from glora_llm.report.comparison import kind_of, loss_figure, read_run, table
from scripts.compare_vlora import main
from tests.test_recipe import MINIMAL

SCRATCH = """\
model:
  config: {model_type: llama}
  tokenizer: train:300
adapter: {method: full}
"""


def write_run(folder: Path, vlora: str = "", factor: float = 1.0, accuracy: float | None = None, step: int = 2) -> Path:
    folder.mkdir()
    (folder / "own.yaml").write_text(SCRATCH + vlora + MINIMAL[MINIMAL.index("data:") :])
    (folder / "recipe.yaml").write_text(recipes.dump(recipes.load(str(folder / "own.yaml"))))
    lines = []
    for number in range(step, 81, step):
        lines.append({"step": number, "train/loss": factor * 80 / number, "train/seconds_per_step": 0.5 * factor})
        if number % 40 == 0:
            lines.append({"step": number, "validation/loss": factor * 3})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    test = {"test/loss": 2.5 * factor, "test/perplexity": 12.0 * factor}
    test |= {} if accuracy is None else {"test/accuracy": accuracy}
    summary = {"trained_parameters": int(1000 / factor), "test": test, "seconds": 61.4, "peak_memory_gb": 1.25}
    (folder / "summary.json").write_text(json.dumps(summary))
    for number, size in ((9, 10), (80, 2_000_000)):
        place = folder / "checkpoints" / f"step-{number}"
        place.mkdir(parents=True)
        (place / "state.safetensors").write_bytes(b"x" * size)
    return folder


SHARED = "vlora: {layers_per_compound: 2, rank: 4}\n"


def test_what_is_read_of_a_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", SHARED))
    assert (run.name, run.kind) == ("a", "VLoRA k 2, r 4")
    assert run.steps[:2] == [2, 4] and run.seconds[:2] == [1.0, 2.0], "each line stands for the steps since the last"
    assert run.seconds[-1] == pytest.approx(40) and run.losses[-1] == 1.0
    assert run.validation == [(40, 20.0, 3.0), (80, 40.0, 3.0)]
    assert (run.parameter_bytes, run.checkpoint, run.score) == (4000, 2_000_000, ("perplexity", 12.0))
    assert read_run(write_run(tmp_path / "b", accuracy=0.7)).score == ("accuracy", 0.7)


@pytest.mark.parametrize(
    ("vlora", "kind"),
    [
        ("", "dense"),
        (SHARED, "VLoRA k 2, r 4"),
        ("vlora: {layers_per_compound: null, topology: star, base_gradient: first}\n", "VLoRA k all, r 8, star, first"),
        (
            "vlora: {gains: [row, column], layers_per_compound: {q_proj: 2, up_proj: 1}, lr_factors: {b: 4.0}}\n",
            "VLoRA k q_proj 2 up_proj 1, r 8, gains row column, lr_factors b 4.0",
        ),
    ],
)
def test_kinds(vlora: str, kind: str, tmp_path: Path) -> None:
    assert kind_of(recipes.load(str(write_run(tmp_path / "run", vlora) / "own.yaml"))) == kind


def test_the_figure_shows_every_run_in_all_panels(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / "a"), write_run(tmp_path / "b", SHARED, 1.1), write_run(tmp_path / "c", SHARED, 1.2)]
    figure = loss_figure([read_run(path) for path in paths])
    by_step, by_time, by_size = figure.axes
    curves = [line for line in by_step.lines if len(line.get_xdata()) == 40]
    assert len(curves) == 3 and len(by_time.lines) == 6 and len(by_size.lines) == 3
    assert [line.get_ydata()[-1] for line in curves] == pytest.approx([1.0, 1.1, 1.2])
    assert [line.get_xdata()[0] for line in by_size.lines] == [4000, 3636, 3332]
    assert [line.get_ydata()[0] for line in by_size.lines] == pytest.approx([2.5, 2.75, 3.0])
    colours = [line.get_color() for line in curves]
    assert colours[0] != colours[1] == colours[2] and curves[1].get_linestyle() != curves[2].get_linestyle()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "VLoRA k 2, r 4"]


def test_the_table_has_a_line_a_run_and_the_range_of_seeds(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", accuracy=0.5), write_run(tmp_path / "b", SHARED, 2.0, 0.6)]
    runs.append(write_run(tmp_path / "c", SHARED, 2.0, 0.8))
    text = table([read_run(path) for path in runs])
    assert "| run | model | parameters | test accuracy | seconds | peak memory | checkpoint |" in text
    assert "| a | dense | 1,000 | 0.5000 | 61 | 1.25 GB | 2.0 MB |" in text
    assert "VLoRA k 2, r 4: test accuracy 0.7000 (0.6000 to 0.8000), 2 runs" in text and "\ndense: " not in text


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / name, vlora)) for name, vlora in (("a", ""), ("b", SHARED))]
    picture = tmp_path / "out.png"
    monkeypatch.setattr("sys.argv", ["compare_vlora.py", *runs, "--out", str(picture)])
    assert main() == 0 and picture.stat().st_size > 10_000
    assert "| b | VLoRA k 2, r 4 |" in capsys.readouterr().out
    (tmp_path / "b" / "summary.json").unlink()
    assert main() == 2 and "b has no result yet" in capsys.readouterr().err
    with pytest.raises(UserError, match="is no run folder"):
        read_run(tmp_path)
