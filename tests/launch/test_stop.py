"""A process that is told to end: noted while it trains, followed at once elsewhere, once; a second time ends it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from glora_llm.launch.launcher import written
from glora_llm.launch.stop import SIGNALS, StopRequest, ToldToEnd, ended_tidily


@pytest.fixture(autouse=True)
def none_is_ignored() -> Iterator[None]:
    """A shell starts background jobs with SIGINT ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_noted_while_it_is_deferred_and_followed_then(number: signal.Signals) -> None:
    before, request = signal.getsignal(number), StopRequest()
    with request.listening():
        with pytest.raises(ToldToEnd) as end, request.deferred():
            assert not request.made()
            os.kill(os.getpid(), number)
            assert request.made() and request.reason == number.name
        assert end.value.code == 75 and end.value.message is not None
        assert end.value.message.startswith(f"told to end ({number.name}). This goes on from what is finished:")
        os.kill(os.getpid(), number)  # it ends already
    assert signal.getsignal(number) is before


def test_outside_of_training_it_ends_the_process(capfd: pytest.CaptureFixture[str]) -> None:
    request = StopRequest()
    with request.listening(), pytest.raises(ToldToEnd):
        os.kill(os.getpid(), signal.SIGTERM)


def test_what_was_followed_is_not_raised_again() -> None:
    request = StopRequest()
    with request.listening():
        with pytest.raises(ToldToEnd) as end, request.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            raise request.follow()
        assert end.value.message is None


def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request = StopRequest()
    with request.listening():
        os.kill(os.getpid(), signal.SIGHUP)
        assert not request.made()


def test_another_thread_changes_nothing() -> None:
    def handler() -> object:
        with StopRequest().listening():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(handler).result() is signal.getsignal(signal.SIGTERM)


PRINTS = """
import sys
import time
from glora_llm.launch.outputs import drop_broken_output
sys.stdin.readline()
drop_broken_output()
print("nobody reads this", flush=True)
print("it went on", file=sys.stderr, flush=True)
"""


def test_a_reader_that_is_gone_breaks_nothing() -> None:
    """As `tee` is, which Ctrl-C ends together with the run."""
    piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", PRINTS], text=True, **piped) as process:  # type: ignore[call-overload]
        process.stdout.close()
        assert process.stderr is not None and process.communicate("\n")[1] == "it went on\n"
        assert process.returncode == 0


def test_the_command_is_written_as_it_was_typed() -> None:
    shell = subprocess.run(["which", "sh"], capture_output=True, text=True, check=True).stdout.strip()
    assert written(["python", shell, "--recipe", "a b"], {}) == "sh --recipe 'a b'"
    assert written(["python", "train.py"], {"DS_ACCELERATOR": "cpu"}) == "DS_ACCELERATOR=cpu python train.py"


def test_after_its_hours_it_is_told_to_end() -> None:
    request = StopRequest(max_hours=0.5 / 3600)
    with request.listening(), pytest.raises(ToldToEnd) as end, request.deferred():
        assert not request.made()
        limit = time.monotonic() + 60
        while not request.made() and time.monotonic() < limit:
            time.sleep(0.05)
    assert end.value.code == 75 and str(end.value.message).startswith("told to end (output.max_hours). This goes on")


def test_sigterm_ends_a_command_by_an_exception() -> None:
    with pytest.raises(SystemExit) as end, ended_tidily():
        os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
