"""No test reaches another machine; and a run asks the hub for its model once, before anything else, and never again."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from glora_llm.models.embedded import embedded_folder
from tests.training.launching import ROOT, environment

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ASKS = "import socket; socket.create_connection(('192.0.2.1', 443), timeout=1)"


@pytest.mark.parametrize("host", ["192.0.2.1", "example.org", "2001:db8::1"])
def test_other_machines_are_refused(host: str) -> None:
    with pytest.raises(ConnectionRefusedError, match="tests reach no other machine"):
        socket.create_connection((host, 443), timeout=1)


def test_this_machine_is_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername()[0] == "127.0.0.1"


@pytest.mark.parametrize("variables", [dict(os.environ), environment()], ids=["inherited", "of a launch"])
def test_processes_that_tests_start_are_refused_too(variables: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", ASKS], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "NetworkRefused: tests reach no other machine" in done.stderr


@pytest.mark.slow
@pytest.mark.reliability
def test_a_run_asks_the_hub_in_its_resolve_phase_alone(tmp_path: Path) -> None:
    """A model of the hub that is in the hub's cache, with no variable that says offline: trained, saved and merged."""
    model = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(embedded_folder("tiny-llama"), model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    log = tmp_path / "asked"
    more = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "GLORA_NETWORK_LOG": str(log)}
    command = [
        sys.executable, "-m", "glora_llm", "train", "--recipe", "tiny_cpu", "model.name_or_path=someone/tiny",
        "training.steps=2", "training.warmup=0", "data.max_rows=64", "data.validation=8", "data.max_test_rows=8",
        "merge.after_training=true", f"output.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()
    asked = log.read_text().splitlines()
    assert asked, "the hub was not asked, so nothing is shown"
    later = [line for line in asked if "glora_llm/models/resolve.py:_download" not in line]
    assert not later, later[:3]
    (model / "refs" / "main").write_text("f" * 40)  # the model on the hub has changed since: the run keeps its commit
    again = subprocess.run(command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "had ended already" in again.stdout, again.stderr[-3000:]
