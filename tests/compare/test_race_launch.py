"""A race of real trials, on targets of their own, each at the rate of `training.lr: auto`."""

import json
import sys
from pathlib import Path

import pytest

from tests.compare.test_compare_launch import LONGEST, SMALL
from tests.training.launching import finished

METHODS = ["lora@q_proj+v_proj", "glora:uniform@down_proj", "ia3"]


@pytest.mark.launch
def test_a_race(tmp_path: Path) -> None:
    command = [
        *("compare", "--recipe", "tiny_cpu", "--methods", ",".join(METHODS), "--budget", "2k", "--nearest", "--race"),
        *("--seeds", "1", "--rates", "auto", "--forgetting", "none", "--out", str(tmp_path / "out"), *SMALL),
    ]
    done = finished([sys.executable, "-m", "glora_llm", *command], timeout=LONGEST)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    rows = {row["name"]: row for row in content["methods"]}
    assert list(rows) == METHODS
    assert rows["ia3"]["verdict"] == "not run" and "training.lr is auto, which is one rate for" in rows["ia3"]["why"]
    assert sorted(row["verdict"] for row in rows.values()) == ["best", "not run", "stopped"]
    assert sorted(row["steps_spent"] for row in rows.values()) == [0, 2, 4] and content["steps_spent"] == 6
    best = next(row for row in rows.values() if row["verdict"] == "best")
    config = json.loads((Path(best["trials"][0]) / "adapter" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == set(best["name"].partition("@")[2].split("+"))
    assert "was stopped at step 2: validation loss " in done.stdout and "6 in all" in done.stdout
