"""Standard output and standard error: lines go out as they are printed; what nobody can read any more goes nowhere."""

import contextlib
import io
import os
import select
import sys


def print_line_by_line() -> None:
    """Let each line go out as it is printed, into a pipe or a file too: one in a buffer is lost with its process.

    What the terminal's encoding has no sign for becomes an escape: a message must not end in a traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not so in a notebook, or where standard output is closed
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


def drop_broken_output() -> None:
    """Send what is printed from here on to nowhere, if nobody reads it any more.

    A closed terminal, or a `tee` that Ctrl-C ended too, must not keep a checkpoint from being written.
    """
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            _send_nowhere(descriptor)


def drop_full_output() -> None:
    """Send to nowhere what a full disk does not take: Python would try again at its end, and exit with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with contextlib.suppress(io.UnsupportedOperation):  # a stream of a notebook
                _send_nowhere(stream.fileno())


def _send_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
