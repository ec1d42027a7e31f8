"""A page in headless Chromium, driven over its debugging pipe (no sockets, no packages)."""

from __future__ import annotations

import base64
import json
import os
import select
import struct
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

HOST = "--host-resolver-rules=MAP * ~NOTFOUND"
SECONDS = 60  # that an answer may take
WATCHED = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
# Elements that stick out of the page at the right, except in boxes that scroll and in drawings.
STICK_OUT = """[...document.querySelectorAll("main *")].filter((e) => !e.closest(".scroll") && !e.closest("svg") &&
  e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map((e) => e.outerHTML.slice(0, 80))"""


class Seen(NamedTuple):
    """A page at one width: the viewport's and the content's, what sticks out, a screenshot, messages and requests."""

    viewport: int
    content: float
    wide: list[str]
    screenshot: bytes
    messages: list[str]
    requests: list[str]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the screenshot."""
        assert self.screenshot.startswith(b"\x89PNG")
        return struct.unpack(">II", self.screenshot[16:24])


class Chrome:
    """A browser with one tab. Use it in a `with` block."""

    def __init__(self, chromium: str, folder: Path) -> None:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # The browser reads descriptor 3 and writes 4; the shell puts the pipes there.
        command = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$@"'
        call = [chromium, "--headless", "--no-sandbox", "--disable-gpu", HOST, "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            ["bash", "-c", command, "bash", *call, f"--user-data-dir={folder / 'profile'}"],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._number, self._session, self._rest = 0, None, b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Chrome:
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result; events that come before it are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, (method, found)
                return found["result"]
            self.events.append(found)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready = select.select([self._read], [], [], SECONDS)[0]
            more = os.read(self._read, 2**20) if ready else b""
            assert more, "the browser has ended, or hangs"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def look(self, page: Path, width: int, height: int = 800) -> Seen:
        """Open a file at this width of the viewport, as a phone would below 600 pixels."""
        self.events.clear()
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **metrics)
        self.ask("Emulation.setScrollbarsHidden", hidden=True)
        self.ask("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())
        sizes = self.ask("Page.getLayoutMetrics")
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True, fromSurface=True)
        wide = self.ask("Runtime.evaluate", expression=STICK_OUT, returnByValue=True)["result"]["value"]
        inner = self.ask("Runtime.evaluate", expression="innerWidth", returnByValue=True)["result"]["value"]
        asked = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        said = [json.dumps(event["params"]) for event in self.events if event.get("method") in WATCHED]
        content = sizes["cssContentSize"]["width"]
        return Seen(inner, content, wide, base64.b64decode(shot["data"]), said, asked)
