"""A headless Chromium, controlled over a pipe with the DevTools protocol. It records a page's log, its requests and its appearance."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_SECONDS = 90.0


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab. `events` has all events of the browser, in order."""

    def __init__(self, executable: str, profile: Path):
        to_browser, ours_out = os.pipe()
        ours_in, from_browser = os.pipe()
        self.events: list[dict[str, Any]] = []
        self._out, self._in, self._buffer, self._number = ours_out, ours_in, b"", 0
        self._session: str | None = None

        def connect_pipes() -> None:  # the browser reads from descriptor 3 and writes to 4
            reading, writing = os.dup(to_browser), os.dup(from_browser)
            os.dup2(reading, 3)
            os.dup2(writing, 4)

        self._log = (profile.parent / "chromium.log").open("wb")
        self._process = subprocess.Popen(
            [
                executable,
                "--headless",
                "--no-sandbox",  # Chromium's sandbox does not start as root, and the pages are our own
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            close_fds=False,
            preexec_fn=connect_pipes,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        os.close(to_browser)
        os.close(from_browser)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        try:
            self.call("Browser.close")  # also ends its helper processes; a kill would leave them running for a while
            self._process.wait(10)
        finally:
            self._process.kill()
            self._process.wait()
        self._log.close()
        os.close(self._out)
        os.close(self._in)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command."""
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _SECONDS
        while True:
            reply = self._read(deadline)
            if reply.get("id") == number:
                assert "error" not in reply, f"{method}: {reply['error']}"
                return reply["result"]
            self.events.append(reply)

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"Chromium did not answer within {_SECONDS:g} s"
            data = os.read(self._in, 1 << 20)
            assert data, "Chromium ended"
            self._buffer += data
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def view(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """Sets the size of the window and the colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def open(self, page: Path, fragment: str = "") -> None:
        """Opens a file and waits until the report is drawn."""
        self.call("Page.navigate", url="about:blank")  # so that a new fragment of the same file reloads it
        self.call("Page.navigate", url=page.absolute().as_uri() + (f"#{fragment}" if fragment else ""))
        self.wait("document.documentElement?.dataset.ready === 'yes'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, converted through JSON. Awaits a promise."""
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def wait(self, condition: str, accept: Callable[[Any], bool] = bool) -> Any:
        """Waits until `accept` returns True for the expression's value, and returns the value."""
        deadline = time.monotonic() + _SECONDS
        while not accept(value := self.evaluate(condition)):
            assert time.monotonic() < deadline, f"{condition} stayed {value!r}; problems of the page: {self.problems()}"
            time.sleep(0.05)
        return value

    def click(self, x: float, y: float) -> None:
        self.hover(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))["data"]
        path.write_bytes(base64.b64decode(data))

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 12_000), "scale": 1}}

    def problems(self) -> list[str]:
        """Logged warnings and errors, including violations of the page's policy, and exceptions."""
        found = []
        for event in self.events:
            kind, about = event.get("method"), event.get("params", {})
            if kind == "Runtime.exceptionThrown":
                found.append(json.dumps(about["exceptionDetails"])[:500])
            elif kind == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
                found.append(json.dumps(about["args"])[:500])
            elif kind == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
                found.append(json.dumps(about["entry"])[:500])
        return found

    def requests(self) -> list[str]:
        """URLs of all requests, without those of the opened files."""
        urls = [event["params"]["request"]["url"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("file:") and url != "about:blank"]
