"""`glora-llm tokenizer`: train a tokenizer."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from glora_llm.atomic import require_new, whole_folder
from glora_llm.errors import UserError

TOKENIZER = """\
Train a sentencepiece BPE tokenizer of LLaMA's kind on your text, as transformers loads it.

examples:
  glora-llm tokenizer train book.txt more.jsonl --vocab-size 8000 --out tokenizer
  glora-llm tokenizer train rows.csv --column review --vocab-size 4000 --out tokenizer

In a recipe: model.tokenizer=tokenizer; or model.tokenizer=train:8000, which trains on the recipe's
training text."""


def add_command(commands: Any, style: Any) -> None:
    """Add `tokenizer train` to the parser of `glora-llm`."""
    tokenizer = commands.add_parser("tokenizer", help="train a tokenizer", description=TOKENIZER, formatter_class=style)
    actions = tokenizer.add_subparsers(title="actions", metavar="ACTION", required=True)
    command = actions.add_parser("train", help="on your text", description=TOKENIZER, formatter_class=style)
    command.add_argument("files", metavar="FILE", nargs="+", help="as data.source: txt, json, jsonl, csv, parquet")
    command.add_argument("--vocab-size", metavar="N", type=int, required=True, help="pieces, bytes and <s> included")
    command.add_argument("--column", metavar="NAME", default="text", help="of files with columns (default: text)")
    command.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to write")
    command.set_defaults(command=train_tokenizer)


def train_tokenizer(arguments: argparse.Namespace) -> int:
    """Run `glora-llm tokenizer train`: train a sentencepiece tokenizer on files and write its folder.

    Raises:
        UserError: when the folder exists, a file cannot be read, or the size does not fit the text.
    """
    require_new(arguments.out)
    from glora_llm.launch.quiet import quiet_libraries

    quiet_libraries()
    from glora_llm.data.sources import locate
    from glora_llm.models import train_tokenizer as sentencepiece

    size = arguments.vocab_size
    tables = [(name, locate(name, None, "train", documents=True).read().rows) for name in arguments.files]
    texts = _texts(tables, arguments.column)
    with whole_folder(arguments.out) as folder:
        sentencepiece.train_tokenizer(texts, size, folder)
    print(f"{arguments.out}: {size} pieces, as model.tokenizer of a recipe")
    return 0


def _texts(tables: Sequence[tuple[str, list[dict[str, Any]]]], column: str) -> Iterator[str]:
    for name, rows in tables:
        for row in rows:
            if not isinstance(row.get(column), str):
                there = ", ".join(row)
                raise UserError(f"{name} has no text in column '{column}'; it has: {there}. Name it by --column.")
            yield row[column]
