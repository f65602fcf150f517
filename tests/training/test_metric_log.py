"""metrics.jsonl and TensorBoard say the same, and after a resume say each step once."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from glora_llm.recipe import load
from glora_llm.training import metric_file
from glora_llm.training.hyperparameters import compared_settings
from glora_llm.training.metric_log import MetricLog


def values(step: int, run: int = 0) -> dict[str, float]:
    return {
        "train/loss": 5.0 - step / 8 + run,
        "train/lr": step / 16,
        "train/grad_norm": 0.5,
        "train/tokens_per_second": 100.0 + step,
        "train/seconds_per_step": 0.5,
    }


def log_steps(folder: Path, start: int, stop: int, run: int = 0) -> None:
    """Log steps as one launch does: in another second than the launch before it, by which TensorBoard orders files."""
    began = [int(file.name.split(".")[3]) for file in folder.glob("tensorboard/events.*")]
    while int(time.time()) <= max(began, default=0):
        time.sleep(0.05)
    log = MetricLog(folder, start, total=8, enabled=True)
    for step in range(start + 1, stop + 1):
        log.scalars(step, values(step, run))
    log.scalars(stop, {"validation/loss": 1.5 + run})
    log.close()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def in_tensorboard(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()


def series(folder: Path, name: str) -> dict[int, float]:
    """Return step -> value of one metric of metrics.jsonl, each step once."""
    found = [(line["step"], line[name]) for line in lines(folder) if name in line]
    assert len(dict(found)) == len(found)
    return dict(found)


def assert_both_say_the_same(folder: Path) -> None:
    board = in_tensorboard(folder)
    names = {name for line in lines(folder) for name in line if name != "step"}
    assert names and set(board.Tags()["scalars"]) == names
    for name in names:
        events = board.Scalars(name)
        assert len({event.step for event in events}) == len(events), name
        assert {event.step: event.value for event in events} == pytest.approx(series(folder, name)), name


def test_both_hold_what_was_logged(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, 4)
    assert lines(tmp_path)[0] == {"step": 1, **values(1)}
    assert series(tmp_path, "train/loss") == {step: 5.0 - step / 8 for step in (1, 2, 3, 4)}
    assert series(tmp_path, "validation/loss") == {4: 1.5}
    assert_both_say_the_same(tmp_path)


def test_a_resumed_log_drops_what_comes_later_and_what_was_cut_off(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')
    log_steps(tmp_path, 3, 8, run=1)
    expected = {step: 5.0 - step / 8 + (step > 3) for step in range(1, 9)}
    assert series(tmp_path, "train/loss") == expected
    assert series(tmp_path, "validation/loss") == {8: 2.5}
    assert_both_say_the_same(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_a_line_cut_off_in_an_earlier_step_is_dropped_too(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')
    log_steps(tmp_path, 2, 4)
    assert sorted(series(tmp_path, "train/loss")) == [1, 2, 3, 4]


def test_a_new_start_in_the_same_folder_forgets_the_old_one(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, 5)
    log_steps(tmp_path, 0, 3, run=2)
    assert sorted(series(tmp_path, "train/loss")) == [1, 2, 3]
    assert_both_say_the_same(tmp_path)


def test_compared_settings_name_slots_in_a_few_words() -> None:
    def slots(*changes: str) -> object:
        recipe = load("tiny_cpu", list(changes))
        return compared_settings(recipe, trained=10)["slots"]

    assert slots() == "A lora, B lora, C, E"
    assert slots("adapter.slots=null", "adapter.preset=ssf") == "A, D, E"
    assert slots("adapter.slots=null", "adapter.method=lora") == "none"
    assert slots("adapter.slots=null", "adapter.paths=sample") == "a supernet"
    assert (
        slots("adapter.slots={E: scalar}", "adapter.paths={q_proj: {B: lora}}") == "E scalar; others by adapter.paths"
    )


def test_test_scores_are_a_dot_in_the_charts_of_the_validation(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, 8)
    log = MetricLog(tmp_path, 8, total=8, enabled=True)
    log.test_scores(8, {"test/loss": 1.0})
    log.test_scores(8, {})
    log.close()
    assert_both_say_the_same(tmp_path)  # nothing is added to the run itself
    board = EventAccumulator(str(tmp_path / "tensorboard" / "test")).Reload()
    assert board.Tags()["scalars"] == ["validation/loss"]
    assert [(event.step, event.value) for event in board.Scalars("validation/loss")] == [(8, 1.0)]


def test_text_stands_in_tensorboard(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, 0, total=8, enabled=True)
    log.text("recipe", "training:\n  lr: 0.001\n")
    log.close()
    (event,) = in_tensorboard(tmp_path).Tensors("recipe/text_summary")
    assert b"  lr: 0.001" in event.tensor_proto.string_val[0]


def test_what_is_not_finite_is_null_in_json(tmp_path: Path) -> None:
    """NaN is no JSON: jq and JavaScript would refuse the whole line."""
    log = MetricLog(tmp_path, 0, total=8, enabled=True)
    log.scalars(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": 0.5})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1, "train/loss": None, "train/grad_norm": None, "train/lr": 0.5
    }  # fmt: skip


def test_other_ranks_write_and_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricLog(tmp_path, 0, total=8, enabled=False)
    log.scalars(1, values(1))
    log.text("recipe", "x")
    log.begin({"a": 1})
    log.test_scores(1, {"test/loss": 2.0})
    log.end({"a": 1}, ["validation/loss"], ["test/loss"])
    log.progress(1, values(1))
    log.say("hello")
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_progress_prints_the_first_and_the_last_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a terminal: lines, at most one every five seconds in between."""
    monkeypatch.setattr("glora_llm.training.metric_log.SECONDS_BETWEEN_LINES", math.inf)
    log = MetricLog(tmp_path, 2, total=8, enabled=True)
    for step in range(3, 9):
        log.progress(step, values(step))
    log.close()
    first, last = capsys.readouterr().out.splitlines()
    assert first == "step 3/8: loss 4.6250, lr 1.88e-01, grad norm 0.5, 103 tokens/s, 0:02 left"
    assert last == "step 8/8: loss 4.0000, lr 5.00e-01, grad norm 0.5, 108 tokens/s, 0:00 left"


def test_scores_are_printed_and_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricLog(tmp_path, 0, total=8, enabled=True)
    log.scores(4, {"validation/loss": 1.5, "validation/exact_match": 0.25})
    log.close()
    assert capsys.readouterr().out == "step 4/8: validation/loss 1.5000, validation/exact_match 0.2500\n"
    assert series(tmp_path, "validation/exact_match") == {4: 0.25}


@pytest.mark.parametrize("block", [7, 64, 1 << 16])
def test_a_file_is_read_from_its_end(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is cut into blocks: the lines up to a step stay, byte for byte, whatever stands behind them."""
    monkeypatch.setattr(metric_file, "BLOCK", block)
    lines = [json.dumps({"step": step, "train/loss": step / 3}) + "\n" for step in range(1, 30)]
    lines[9:9] = [json.dumps({"step": 9, "validation/loss": 0.5}) + "\n"]
    for start, kept in ((0, 0), (8, 8), (9, 10), (29, 30), (40, 30)):
        for tail in ("", '{"step": 30', '[1]\n{"step": 31, "a": 1}', "\n\n"):
            (tmp_path / "metrics.jsonl").write_text("".join(lines) + tail)
            file = metric_file.MetricFile(tmp_path / "metrics.jsonl", print)
            assert file.names_at(9) == {"step", "train/loss", "validation/loss"}
            assert file.names_at(50) == set()
            file.forget_from(start)
            assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:kept])
    assert metric_file.MetricFile(tmp_path / "absent", print).names_at(1) is None


def test_lines_that_cannot_be_written_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = metric_file.MetricFile(tmp_path / "absent" / "metrics.jsonl", print)
    file.append(1, {"a": 1.0})
    file.append(2, {"a": math.nan})
    assert capsys.readouterr().out.count("cannot be written") == 1
    (tmp_path / "absent").mkdir()
    file.append(3, {"a": 3.0})
    assert "is written again, with the 3 lines since then" in capsys.readouterr().out
    assert [line["a"] for line in lines(tmp_path / "absent")] == [1.0, None, 3.0]
