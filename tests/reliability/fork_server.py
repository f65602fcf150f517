"""Runs `glora-llm ARGUMENTS` in forked processes: the imports, which take longer than a small run, are done once.

Reads a JSON object a line: {"arguments": [...], "environment": {...}, "log": FILE} starts one and answers with its
process number; {"poll": NUMBER} answers with its exit code (negative: of the signal that killed it), or null.
"""

import json
import os
import signal
import sys
import traceback
from typing import Any


def load() -> None:
    """Import what a run, a search and a merge import; no tensor is made, so that no thread is there when we fork."""
    import bitsandbytes  # noqa: F401
    import deepspeed  # noqa: F401
    import tensorboard.backend.event_processing.event_accumulator  # noqa: F401

    import glora_llm.evaluation.scoring
    import glora_llm.merge.command
    import glora_llm.run.search
    import glora_llm.run.train  # noqa: F401
    from glora_llm.launch.quiet import quiet_libraries

    quiet_libraries()


def run(request: dict[str, Any]) -> None:
    """Be one run: this process's output goes to a file, and the process ends with the command's exit code."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, target)
    os.environ.update(request["environment"])
    sys.orig_argv[:] = ["glora-llm", *request["arguments"]]
    code = 1
    try:
        from glora_llm.cli import main

        code = main(request["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - as Python does at the end of a process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Serve until standard input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    load()
    print(json.dumps("ready"), file=out, flush=True)
    for line in sys.stdin:
        request, answer = json.loads(line), None
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                run(request)
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
