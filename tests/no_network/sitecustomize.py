"""Lets Python processes reach this machine alone: conftest.py runs this, and puts this folder on PYTHONPATH for others.

What is refused is also noted in the file that GLORA_NETWORK_LOG names, a line each: the host, and who asked.
"""

import os
import socket
import sys
import traceback
from typing import Any

LOCAL = {"", "localhost", "localhost.localdomain", "0.0.0.0", "::", "::1", socket.gethostname()}
ASKED = {"socket.connect", "socket.sendto", "socket.sendmsg"}
LOOKED_UP = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}


class NetworkRefused(ConnectionRefusedError):
    """A test wanted to reach another machine."""


def is_local(host: object) -> bool:
    """Tell whether a name or an address is this machine's."""
    text = host.decode() if isinstance(host, bytes) else host
    return text is None or text in LOCAL or (isinstance(text, str) and text.startswith("127."))


def refuse_others(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse, as an audit hook, what would leave this machine."""
    if event in ASKED:
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # a path, of a Unix socket, is local
    elif event in LOOKED_UP:
        host = arguments[0]
    else:
        return
    if is_local(host):
        return
    log = os.environ.get("GLORA_NETWORK_LOG")
    if log:
        asked = [f"{frame.filename}:{frame.name}" for frame in traceback.extract_stack()]
        with open(log, "a") as file:
            file.write(f"{host!r} {' '.join(asked)}\n")
    raise NetworkRefused(f"tests reach no other machine, and this is {host!r}")


sys.addaudithook(refuse_others)
