"""One rank of a run: `deepspeed train.py --recipe NAME [section.key=value ...]`; `--help` tells more."""

from glora_llm.cli import train_main

if __name__ == "__main__":
    raise SystemExit(train_main())
