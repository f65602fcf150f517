"""Memory that a step frees is there for the next step, unless the user asked for something else."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from glora_llm.launch.cpu_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for turn in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [bytearray(b"x") * 2**23 for _ in range(32)]
    del held
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 2**28)
"""


def share_faulted_in(how: str, **variables: str) -> float:
    """Return the share of what the third of three equal steps allocates that the kernel gives it anew."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", PROGRAM, how]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=clean | variables).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other allocators")
def test_freed_memory_is_kept_unless_the_user_says_how() -> None:
    assert share_faulted_in("default") > 0.8
    assert share_faulted_in("kept") < 0.1
    assert share_faulted_in("kept", MALLOC_TRIM_THRESHOLD_="131072") > 0.8
