"""One process of a training whose checkpoints take seconds to write, as those of large models do.

deepspeed --module scripts.gpu_checks.slow_writer SECONDS NOTES RECIPE [section.key=value ...]

In the folder NOTES, `written` holds the time at which the last checkpoint was there, and `left-RANK` the time at which
that process ended.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from glora_llm.cli import train_main
from glora_llm.training import checkpoint


def main() -> int:
    """Train, with a pause before each checkpoint is written; return the exit code."""
    seconds, folder, recipe, *overrides = [text for text in sys.argv[1:] if not text.startswith("--")]
    notes, write = Path(folder), checkpoint.write

    def write_slowly(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(float(seconds))
        result = write(*arguments, **keywords)
        (notes / "written").write_text(str(time.time()), encoding="utf-8")
        return result

    checkpoint.write = write_slowly
    try:
        return train_main(["--recipe", recipe, *overrides])
    finally:
        (notes / f"left-{os.environ['RANK']}").write_text(str(time.time()), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
