"""A process whose port is taken, or whose companions do not come, ends with one message."""

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from glora_llm.errors import UserError
from glora_llm.launch import ranks
from tests.training.launching import ROOT, environment

ALONE = """
import sys
from collections.abc import Iterator
from glora_llm.errors import UserError
from glora_llm.launch import ranks

ranks.MEETING_SECONDS = 2.0
try:
    ranks.start()
except UserError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    """A port that somebody listens at."""
    listener = socket.create_server(("127.0.0.1", 0))
    yield listener
    listener.close()


def start(**launch: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", ALONE], cwd=ROOT, env=environment(MASTER_ADDR="127.0.0.1", LOCAL_RANK="0", **launch),
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_a_process_does_not_wait_for_ever_for_the_others() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    done = start(RANK="0", WORLD_SIZE="2", MASTER_PORT=port)
    assert done.returncode == 2, done.stderr
    assert (
        f"error: this is RANK=0 of WORLD_SIZE=2 processes, MASTER_ADDR=127.0.0.1, MASTER_PORT={port}, and"
        in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_a_world_without_a_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE=2, and RANK is not set"):
        ranks.start()


def test_a_port_that_is_taken_is_named(taken: socket.socket) -> None:
    port = str(taken.getsockname()[1])
    done = start(RANK="0", WORLD_SIZE="1", MASTER_PORT=port)
    assert (
        f"refused: This is RANK=0 of WORLD_SIZE=1 processes, MASTER_ADDR=127.0.0.1, MASTER_PORT={port}" in done.stderr
    )
    assert "Choose a free MASTER_PORT" in done.stderr
