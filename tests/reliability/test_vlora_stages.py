"""The forms of VLoRA at the ZeRO stages that tests/vlora/test_zero.py leaves out."""

import json
from typing import Any

import pytest

from tests.training.launching import finished, launch
from tests.vlora.worker import FURTHER

pytestmark = pytest.mark.reliability
EVERY = [f"{form}/zero{stage}/{name}" for form, places in FURTHER.items() for stage, name in places]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("vlora") / "found.json"
    done = finished(launch("tests/vlora/worker.py", str(out), "further"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    read: dict[str, Any] = json.loads(out.read_text())
    return read


@pytest.mark.parametrize("name", EVERY)
def test_a_stage_trains_as_the_dense_twin(found: dict[str, Any], name: str) -> None:
    assert isinstance(found[name], dict), found[name]
    assert found[name]["loss"] < 1e-6 and found[name]["gradient"] < 1e-4 and found[name]["weight"] < 1e-5
