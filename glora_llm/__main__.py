"""Run the command line: `python -m glora_llm ...`."""

from glora_llm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
