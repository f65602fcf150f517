"""`glora-llm watch`: TensorBoard serves runs on localhost, on pages that hold what people look for; asked by HTTP."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from glora_llm.cli import main
from glora_llm.cli.watch import start_tensorboard
from glora_llm.training.metric_log import MetricLog


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> str:
    """TensorBoard's address, over the logs of two runs: one that has ended, and one that has not."""
    runs = tmp_path_factory.mktemp("runs")
    for name, lr in ("ended", 1e-3), ("going", 2e-3):
        settings: dict[str, str | float] = {"learning rate": lr, "slots": "B lora"}
        log = MetricLog(runs / name, 0, total=2, enabled=True)
        log.begin(settings)
        log.scalars(1, {"train/loss": 1.5, "train/tokens_per_second": 10.0, "validation/loss": 1.0})
        if name == "ended":
            log.test_scores(2, {"test/loss": 0.75})
            log.end(settings, ["validation/loss"], ["test/loss"])
        log.close()
    return start_tensorboard(runs, None)


def ask(server: str, path: str, **question: object) -> Any:
    """Return what TensorBoard answers; its first answer waits until the logs have been read."""
    body = json.dumps(question).encode() if question else None
    request = urllib.request.Request(f"{server.partition('#')[0]}data/{path}", body)
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_a_run_is_served_with_its_own_page_first(server: str) -> None:
    address, _, page = server.partition("#")
    assert address.startswith("http://localhost:") and page == "custom_scalars"
    (category,) = ask(server, "plugin/custom_scalars/layout")["category"]
    assert [chart["title"] for chart in category["chart"]] == [
        "loss", "validation scores", "learning rate", "throughput", "gradient norm",
    ]  # fmt: skip
    found = ask(server, "plugin/custom_scalars/scalars?run=ended/tensorboard&tag=train/loss")
    ((_, step, value),) = next(iter(found["tag_to_events"].values()))
    assert (step, value) == (1, 1.5)


def test_the_charts_stand_on_two_pages(server: str) -> None:
    tags = ask(server, "plugin/scalars/tags")
    assert set(tags) == {"ended/tensorboard", "ended/tensorboard/test", "going/tensorboard"}
    assert {tag.partition("/")[0] for names in tags.values() for tag in names} == {"train", "validation"}
    assert list(tags["ended/tensorboard/test"]) == ["validation/loss"]


def test_runs_are_compared_by_settings_and_final_scores(server: str) -> None:
    experiment = ask(server, "plugin/hparams/experiment", experimentName="")
    assert [info["name"] for info in experiment["hparamInfos"]] == ["learning rate", "slots"]
    assert [info["displayName"] for info in experiment["metricInfos"]] == ["test loss", "validation loss"]
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    question = {"experimentName": "", "allowedStatuses": statuses, "colParams": [], "startIndex": 0, "sliceSize": 9}
    groups = ask(server, "plugin/hparams/session_groups", **question)["sessionGroups"]
    found = {Path(group["name"]).name: group for group in groups}
    assert {name: group["hparams"] for name, group in found.items()} == {
        "ended": {"learning rate": 1e-3, "slots": "B lora"},
        "going": {"learning rate": 2e-3, "slots": "B lora"},
    }
    assert [metric["value"] for metric in found["ended"]["metricValues"]] == [0.75, 1.0]


def test_a_folder_without_a_log_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path)]) == 2
    assert f"{tmp_path} has no TensorBoard log" in capsys.readouterr().err
