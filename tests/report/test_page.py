"""The report of runs: what it says, that it is one file by itself, and that nothing in it can run."""

import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from glora_llm.cli import main
from glora_llm.report.page import TEMPLATES, write_report
from glora_llm.report.page_figures import GROUPS, thin
from glora_llm.report.page_svg import VARIABLES
from glora_llm.report.run_record import Series
from tests.report.made_runs import LAUNCH, write_comparison, write_run

EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> $a_b$ & more"


class Reader(HTMLParser):
    """Reads a page: its tags, identifiers, references and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.names: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(page)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} has {name}"
            if name == "id":
                self.names.append(str(value))
            if name in ("href", "xlink:href", "src"):
                self.references.append(str(value))
            self.references += [f"#{found}" for found in re.findall(r"url\(#([^)]*)\)", value or "")]

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def report(*runs: Path) -> str:
    out = runs[0].parent / "report.html"
    write_report(runs, out)
    return out.read_text(encoding="utf-8")


def test_a_run_with_all_that_it_can_have(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine")
    (run / "launches.jsonl").write_text(f"{json.dumps(LAUNCH)}\n{json.dumps(LAUNCH | {'from_step': 20})}\n")
    (run / "samples.jsonl").write_text(json.dumps({"prompt": "2 + 2?", "before": "fish", "after": "four"}) + "\n")
    (run / "eval").mkdir()
    tasks = {"arc_easy": {"acc": 0.4375, "acc_stderr": 0.0125}}
    (run / "eval" / "arc.json").write_text(
        json.dumps({"tasks": tasks, "num_fewshot": {"arc_easy": 5}, "weights": "the adapter"})
    )
    (run / "merged").mkdir()
    merge = {"max_abs_logit_diff": 3e-6, "top1_agreement": 0.9875, "loss_before": 1.5, "loss_after": 1.5, "tokens": 411}
    (run / "merged" / "merge_report.json").write_text(json.dumps(merge))
    best = {"best": {"score": "accuracy", "value": 0.75, "step": 30}, "deployed_step": 30, "stopped_early": "no gain"}
    best |= {"forgetting": {"before": 2.5, "after": 2.75}}
    (run / "summary.json").write_text(json.dumps(json.loads((run / "summary.json").read_text()) | best))
    page = Reader(report(run))
    for expected in (
        "Training ended early: no gain.", "2.5000 before, 2.7500 after",
        "The best validation (accuracy 0.7500) was after step 30", "after step 30.",
        "mine", "GLoRA (rank 4) on some/base", "40 steps of 16 samples", "0.6250", "0.0125 before training", "18,432",
        "lora, rank 4", "slot A", "1.50 GB", "0.9875", "3.00e-06", "fish", "four", "arc_easy", "0.4375", "0.0125",
        "weights: the adapter", LAUNCH["command"], LAUNCH["commit"], "torch 2.13.0", "2 cores of Some CPU", "f" * 64,
        "global_batch: 16", "a launch went on", "Launches: the run was ended or failed, and went on",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert page.tags.count("h1") == 1 and page.tags.count("svg") >= 7


def test_it_is_one_file_in_which_every_name_is_once(tmp_path: Path) -> None:
    text = report(write_run(tmp_path / "a"), write_run(tmp_path / "b"), write_comparison(tmp_path / "c"))
    page = Reader(text)
    assert "script" not in page.tags and "link" in page.tags
    assert len(page.names) == len(set(page.names)) and len(page.names) > 50
    for reference in page.references:
        inside = reference.startswith("#") and reference[1:] in page.names
        assert inside or reference.startswith("data:"), reference
    assert text.count("<title id=") == len(re.findall(r'<svg [^>]*role="img"', text)) > 15, "every figure has a title"


def test_nothing_of_the_data_can_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<b>bold & $x$")
    (run / "samples.jsonl").write_text(json.dumps({"prompt": EVIL, "before": EVIL, "after": EVIL + "\ud800"}) + "\n")
    (run / "launches.jsonl").write_text(json.dumps(LAUNCH | {"command": EVIL, "commit": EVIL}) + "\n")
    text = report(run, write_run(tmp_path / "b", f"description={EVIL}", "data.prompt=<script>{text}</script>"))
    page = Reader(text)  # it refuses attributes such as onerror
    assert "script" not in page.tags and "img" not in page.tags and "b" in page.tags
    assert EVIL not in text and page.text.count("alert(1)") >= 5
    assert page.text.count("<b>bold & $x$") >= 4, "in figures too, and a dollar begins no formula"


def test_ten_thousand_steps_are_fast_and_small(tmp_path: Path) -> None:
    run = write_run(tmp_path / "long", steps=10_000)
    begun = time.process_time()
    text = report(run)
    assert time.process_time() - begun < 5
    assert len(text) < 2_000_000
    assert "10,000 logged values in 400 groups of neighbours" in text


def test_a_thinned_curve_keeps_its_extremes() -> None:
    values = np.random.default_rng(0).normal(size=10_001)
    values[7_777] = np.nan
    found = thin(Series(np.arange(1, 10_002), values))
    assert found is not None and len(found.mean) == GROUPS
    assert found.low.min() == np.nanmin(values) and found.high.max() == np.nanmax(values)
    assert (found.low <= found.mean).all() and (found.mean <= found.high).all()
    assert found.mean[0] == pytest.approx(values[:26].mean()) and found.steps[0] == 13.5
    assert thin(Series(np.arange(800), np.zeros(800))) is None


def test_several_runs_are_compared_first(tmp_path: Path) -> None:
    text = report(write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run", "training.lr=0.5"))
    page = Reader(text).text
    assert page.index("Settings that differ") < page.index("Parameters by part")
    assert "x/run" in page and "y/run" in page, "folders of one name are told apart"
    row = re.search(r"training\.lr (\S+) (\S+)", page)
    assert row is not None and row.groups() == ("0.01", "0.5")
    assert page.count("Loss of the runs by") == 2 and "Time of training steps (s)" in page
    assert "output.dir" not in page[: page.index("Parameters by part")]


def test_a_comparison_of_methods(tmp_path: Path) -> None:
    page = Reader(report(write_comparison(tmp_path / "c"))).text
    for expected in (
        "glora",
        "0.8125",
        "0.7500 to 0.8750",
        "best",
        "behind",
        "0.03",
        "beft was not run: a LLaMA's linears",
        "stopped at step 10",
        "Stopped in the race, by validation label_accuracy: dora at step 10 with 0.5000.",
        "Steps trained: dora 10; 90 in all.",
    ):
        assert expected in page, expected
    assert "2 of 4 methods on recipe tiny_cpu" in page and "each with 10,000 trained parameters" in page
    assert "c/trials/lora-1" in page and "rank 4" in page


def test_a_run_without_a_step_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "new")
    for name in ("metrics.jsonl", "summary.json", "launches.jsonl", "base.json", "adapter/adapter_model.safetensors"):
        (run / name).unlink()
    page = Reader(report(run))
    assert "No step has been logged yet" in page.text and "step 0 of 20" in page.text and "svg" not in page.tags


def test_a_run_that_has_not_ended_is_reported_as_far_as_it_came(tmp_path: Path) -> None:
    run = write_run(tmp_path / "half", steps=12)
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_bytes(b"\xff\x00\n" + f'{lines}{{"step": 13, "train/lo'.encode())
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"\xff" * 12)
    (run / "failure.json").write_text('{"process_rank": 1, "error": "no memory"}')
    page = Reader(report(run)).text
    assert "The run has not ended: step 12 of 20" in page and "process 1): no memory" in page
    assert "2 lines of metrics.jsonl say no step and are left out" in page


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda run: (run / "summary.json").write_text("{"), r"summary\.json is not valid JSON.*Delete the file"),
        (lambda run: (run / "recipe.yaml").unlink(), r"run is no run folder: it has no recipe\.yaml; nor is it"),
        (lambda run: run.with_name("report.html").mkdir(), r"report\.html is a folder, and the report is a file"),
        (lambda run: run.with_name("report.html").write_text("my notes"), "is there already, and is no report"),
        (lambda run: (run / "metrics.jsonl").rename(run / "m") and (run / "metrics.jsonl").mkdir(), "cannot be read"),
        (lambda run: run.with_name("report.html").symlink_to("/dev/null"), "is no plain file"),
        (lambda run: (run / "comparison.json").write_text('{"methods": 3}'), "has no list of methods"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_message(
    change: object, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    change(run)  # type: ignore[operator]
    before = sorted(tmp_path.iterdir())
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 2
    assert re.search(says, " ".join(capsys.readouterr().err.split()))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc, where nobody may write")
def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(write_run(tmp_path / "run")), "--out", "/proc/report.html"]) == 2
    assert "/proc/report.html cannot be written" in " ".join(capsys.readouterr().err.split())


def test_a_folder_of_runs_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "a")
    assert main(["report", str(tmp_path / "runs")]) == 2
    assert f"There are runs in it: {tmp_path / 'runs' / 'a'}" in " ".join(capsys.readouterr().err.split())


def test_an_earlier_report_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "report.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    out.write_text(out.read_text()[:1500])
    assert main(["report", str(run), "--out", str(out)]) == 0
    assert out.read_text().endswith("</html>\n") and "report.html: 0." in capsys.readouterr().out


def test_a_loss_that_is_never_finite_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "diverged", steps=3)
    lines = [{"step": step, "train/loss": None, "train/grad_norm": None} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert "3 values were not finite and are not drawn" in Reader(report(run)).text


def luminance(colour: str) -> float:
    """Return the relative luminance of `#rrggbb`, as WCAG 2.2 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("place", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_the_paper(place: int) -> None:
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root[^{]*\{([^}]*)\}", css)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[place]))
    wanted = dict.fromkeys(VARIABLES.values(), 3.0) | dict.fromkeys(("ink", "muted", "link"), 4.5)
    del wanted["grid"]  # it has to stand back
    for paper in ("paper", "soft"):
        for name, least in wanted.items():
            dark, light = sorted((luminance(colours[name]), luminance(colours[paper])))
            assert (light + 0.05) / (dark + 0.05) >= least, (name, paper)


def test_a_report_loads_no_torch() -> None:
    code = "import sys; from glora_llm.report import page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
