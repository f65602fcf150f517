"""A headless Chromium, driven through its DevTools pipe: two file descriptors and JSON, so nothing has to be installed.

Debian and Ubuntu have it as `apt-get install chromium`.
"""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 120.0  # a machine that does much else starts it slowly
SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
)  # fmt: skip


def find_chromium() -> str | None:
    """Return the program, or None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One page of the browser.

    Attributes:
        told: what the page wrote to the console, errors of loading and of the content security policy among it.
        asked: addresses that it asked for.
    """

    def __init__(self, reader: int, writer: int):
        self.reader, self.writer = os.fdopen(reader, "rb"), os.fdopen(writer, "wb")
        self.number, self.session = 0, ""
        self.told: list[str] = []
        self.asked: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol, and return its result."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": values}
        message |= {"sessionId": self.session} if self.session else {}
        self.writer.write(json.dumps(message).encode() + b"\0")
        self.writer.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def open(self, file: Path, width: int, dark: bool = False) -> None:
        """Show a file in a window of a width in CSS pixels; 390 is a phone's."""
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=file.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def value(self, expression: str) -> Any:
        """Return what a JavaScript expression is in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """Write the whole page as PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        file.write_bytes(base64.b64decode(found["data"]))

    def pdf(self, file: Path) -> None:
        """Print the page on A4."""
        found = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        file.write_bytes(base64.b64decode(found["data"]))

    def _next(self) -> dict[str, Any]:
        """Return the next message, and keep what it says of the console and of the network."""
        pieces = []
        while (piece := self.reader.read(1)) != b"\0":
            assert piece, "Chromium has ended"
            pieces.append(piece)
        message: dict[str, Any] = json.loads(b"".join(pieces))
        method, values = message.get("method"), message.get("params", {})
        if method == "Log.entryAdded":
            self.told.append(values["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.told.append(" ".join(str(one.get("value")) for one in values["args"]))
        elif method == "Runtime.exceptionThrown":
            self.told.append(values["exceptionDetails"]["text"])
        elif method == "Network.requestWillBeSent":
            self.asked.append(values["request"]["url"])
        return message


@contextlib.contextmanager
def chromium(program: str, folder: Path) -> Iterator[Page]:
    """Start a browser whose profile is in a folder, and end it."""
    to_browser, writer = os.pipe()
    reader, from_browser = os.pipe()
    script = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'  # it reads commands from 3 and answers on 4
    command = ["bash", "-c", script, program, *SWITCHES, f"--user-data-dir={folder}", "about:blank"]
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            command, pass_fds=(to_browser, from_browser), stdout=log, stderr=log, start_new_session=True
        )
    os.close(to_browser)
    os.close(from_browser)
    watch = threading.Timer(SECONDS, os.killpg, (process.pid, signal.SIGKILL))  # reading then ends
    watch.start()
    try:
        page = Page(reader, writer)
        yield page
        with contextlib.suppress(AssertionError, OSError):
            page.session = ""
            page.call("Browser.close")
        page.reader.close()
        page.writer.close()
    finally:
        watch.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(SECONDS)
