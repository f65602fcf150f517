"""The command line: one module a command; `main` runs `glora-llm`, `train_main` one process of `train.py`."""

from glora_llm.cli.main import main, train_main

__all__ = ["main", "train_main"]
