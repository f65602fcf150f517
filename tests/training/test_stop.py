"""SIGTERM is noted while a run listens, and means what it meant before afterwards."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

from glora_llm.training.stop import StopRequest


def test_noted_while_it_listens() -> None:
    before, request = signal.getsignal(signal.SIGTERM), StopRequest()
    with request.listening():
        assert not request.made
        os.kill(os.getpid(), signal.SIGTERM)
    assert request.made and signal.getsignal(signal.SIGTERM) is before


def test_another_thread_changes_nothing() -> None:
    def handler() -> object:
        with StopRequest().listening():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(handler).result() is signal.getsignal(signal.SIGTERM)
