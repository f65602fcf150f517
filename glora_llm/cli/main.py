"""The commands `glora-llm ...` and `train.py`. Nothing heavy is imported before it is needed: help answers at once."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from glora_llm import __version__
from glora_llm.cli import (
    compare,
    evaluate,
    import_adapter,
    init,
    merge,
    methods,
    plan,
    recipes,
    report,
    search,
    tasks,
    tokenizer,
    train,
    verify_resume,
    vlora,
    watch,
)
from glora_llm.errors import CheckFailed, UserError
from glora_llm.launch.complaint import print_error, print_once
from glora_llm.launch.outputs import drop_broken_output, drop_full_output, print_line_by_line
from glora_llm.launch.stop import EXIT_CODE, TOLD, ToldToEnd, ended_tidily

PIPE_CLOSED = 128 + 13  # as a shell names SIGPIPE
FAILED_CHECK, BAD_INPUT, TOLD_TO_END, INTERRUPTED = 1, 2, EXIT_CODE, 130
FULL = (errno.ENOSPC, errno.EDQUOT)
# in the order of the help text
COMMANDS = (
    init,
    plan,
    train,
    watch,
    merge,
    search,
    evaluate,
    compare,
    report,
    verify_resume,
    import_adapter,
    vlora,
    tokenizer,
    recipes,
    methods,
    tasks,
)

OVERVIEW = """\
GLoRA fine-tuning of quantised LLaMA-style models with DeepSpeed.

a first run, from nothing to a merged and scored model:
  glora-llm recipes                                     what there is to run
  glora-llm train --gpus all --recipe quickstart        train, on every GPU
  glora-llm evaluate runs/quickstart                    score the adapter on the test records
  glora-llm merge runs/quickstart --out merged          write a plain Hugging Face model
  glora-llm evaluate runs/quickstart --merged merged    score that one too
  glora-llm report runs/quickstart                      all of it as one HTML file

`glora-llm COMMAND --help` explains one command, with examples."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `glora-llm` and return its exit code."""
    print_line_by_line()
    arguments = parsed(command_parser(), argv)
    return guarded(lambda: arguments.command(arguments))


def train_main(argv: Sequence[str] | None = None) -> int:
    """Run `train.py`, one process of a launch, and return its exit code."""
    print_line_by_line()
    parser = argparse.ArgumentParser("train.py", description=train.TRAIN, formatter_class=argparse.RawTextHelpFormatter)
    train.add_train_arguments(parser)
    arguments = parsed(parser, argv)
    return guarded(lambda: train.train(arguments))


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; overrides may stand behind options too, where argparse itself takes no positional."""
    arguments, rest = parser.parse_known_args(argv)
    if any(text.startswith("-") or "=" not in text for text in rest) or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if hasattr(arguments, "overrides"):
        arguments.overrides = [_as_utf8(text) for text in [*arguments.overrides, *rest]]
    _expand_homes(parser, arguments)
    return arguments


def _as_utf8(word: str) -> str:
    """Return a word of the command line as UTF-8, where Python read it in a locale that has no such signs."""
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeError:
        return word


def _expand_homes(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Replace ~ in paths: a shell does it for `--out ~/merged` and leaves it in `--out=~/merged`."""
    paths = {name: value for name, value in vars(arguments).items() if isinstance(value, Path)}
    for name, path in paths.items():
        if str(path).startswith("~"):
            from glora_llm.schema.section import expand_home

            try:
                setattr(arguments, name, Path(expand_home(str(path))))
            except ValueError as error:
                parser.error(str(error))


def guarded(task: Callable[[], int]) -> int:
    """Run `task` and return its exit code; what a user may cause becomes one message instead of a traceback.

    2: bad input (UserError); 1: a result outside its bound (CheckFailed); 75: told to end, and the same command goes
    on (ToldToEnd); 130: interrupted; 141: the reader of a pipe has gone; 143: SIGTERM. All else is a defect and keeps
    its traceback.
    """
    try:
        with ended_tidily():
            return task()
    except UserError as error:
        print_error(str(error))
        return BAD_INPUT
    except CheckFailed as error:
        print_error(f"check failed: {error}")
        return FAILED_CHECK
    except ToldToEnd as end:
        drop_broken_output()
        if end.message is not None:
            print_once(end.message, TOLD)
        return TOLD_TO_END
    except BrokenPipeError:  # `glora-llm recipes | head -2`: nobody reads the rest
        drop_broken_output()
        return PIPE_CLOSED
    except OSError as error:
        if error.errno not in FULL:
            raise
        drop_full_output()
        print_error(f"{error.strerror}: {error.filename or 'standard output'}. Free some space, and start again.")
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of `glora-llm`; each command stores the function that runs it."""
    style = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser("glora-llm", description=OVERVIEW, formatter_class=style)
    parser.add_argument("--version", action="version", version=f"glora-llm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add_command(commands, style)
    return parser
