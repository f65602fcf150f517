"""What the libraries read when they are imported."""

import os
import subprocess
import sys

import pytest

from glora_llm.launch.quiet import quiet_libraries


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, None),
    ],
)
def test_gpu_memory_grows_unless_the_user_says_how(
    own: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is undone at the end
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    quiet_libraries()
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == expected


BAR = """
import sys
import glora_llm.plan.early
from glora_llm.launch.quiet import bars_on_terminals_only
if sys.argv[1] == "quiet":
    bars_on_terminals_only()
from tqdm.auto import tqdm
list(tqdm([1, 2], desc="Converting and de-quantizing GGUF tensors..."))
"""


def test_bars_of_libraries_stay_out_of_log_files() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}  # of an earlier test

    def printed(how: str) -> str:
        command = [sys.executable, "-c", BAR, how]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr

    assert "GGUF" in printed("loud") and printed("quiet") == ""
