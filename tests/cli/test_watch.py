"""`glora-llm watch`: TensorBoard serves a run on localhost, and opens on its own page."""

import json
import urllib.request
from pathlib import Path

import pytest

from glora_llm.cli import main
from glora_llm.cli.watch import start_tensorboard
from glora_llm.training.metric_log import MetricLog


def test_a_run_is_served_with_its_own_page_first(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "mine", 0, total=2, enabled=True)
    log.scalars(1, {"train/loss": 1.5, "speed/tokens_per_second": 10.0})
    log.close()
    address, _, page = start_tensorboard(tmp_path, None).partition("#")
    assert address.startswith("http://localhost:") and page == "custom_scalars"

    def get(path: str) -> object:
        with urllib.request.urlopen(f"{address}data/{path}") as answer:
            return json.load(answer)

    # The first request waits until the log has been read.
    layout = get("plugin/custom_scalars/layout")
    (category,) = layout["category"]  # type: ignore[index]
    assert [chart["title"] for chart in category["chart"]] == [
        "loss", "validation scores", "learning rate", "throughput", "gradient norm",
    ]  # fmt: skip
    found = get("plugin/custom_scalars/scalars?run=mine/tensorboard&tag=train/loss")
    ((_, step, value),) = next(iter(found["tag_to_events"].values()))  # type: ignore[index]
    assert (step, value) == (1, 1.5)


def test_a_folder_without_a_log_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path)]) == 2
    assert f"{tmp_path} has no TensorBoard log" in capsys.readouterr().err
