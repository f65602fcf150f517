"""Run `glora-llm` in a process of its own, and see which slow libraries it loads."""

import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "transformers", "deepspeed", "peft", "bitsandbytes", "datasets", "numpy")
PROBE = f"""
import sys, time
from glora_llm.cli import main
code = 1
try:
    code = main(sys.argv[1:])
finally:
    print("LOADED", *[name for name in {HEAVY!r} if name in sys.modules])
    print("SECONDS", time.process_time())
sys.exit(code)
"""


def run_probed(*command: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], set[str], float]:
    """Return what `glora-llm COMMAND` did, the slow libraries that it loaded, and its processor time in seconds."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *command], cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )
    *_, loaded, seconds = done.stdout.splitlines()
    return done, set(loaded.split()[1:]), float(seconds.split()[1])
