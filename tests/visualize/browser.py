"""Headless Chromium for tests, spoken to over two pipes (its DevTools protocol), with no package for it."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
PATIENCE = 240.0  # seconds for an answer: tests may have a small share of a core


class Page:
    """A tab. said: console messages, exceptions and requests, as they came."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._number, self._buffer = to, back, 0, b""
        self.said: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.said.append(answer)

    def open(self, path: Path, *, width: int = 1200, dark: bool = False, script: bool = True, media: str = "") -> None:
        self.ask("Emulation.setScriptExecutionDisabled", value=not script)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        self.said.clear()
        self.ask("Page.navigate", url=path.resolve().as_uri())
        while not any(one.get("method") == "Page.loadEventFired" for one in self.said):
            self.said.append(self._next())

    def evaluate(self, expression: str) -> Any:
        result = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """A key that types nothing, as Tab or ArrowLeft."""
        codes = {"Tab": 9, "ArrowLeft": 37, "ArrowRight": 39, "Enter": 13}
        for kind in ("rawKeyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def screenshot(self, path: Path) -> None:
        taken = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and exceptions."""
        found = []
        for one in self.said:
            details = one.get("params", {})
            if one.get("method") == "Runtime.exceptionThrown":
                found.append(str(details["exceptionDetails"]))
            if one.get("method") == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
                found.append(str(details["args"]))
            if one.get("method") == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
                found.append(str(details["entry"]))
        return found

    def requests(self) -> list[str]:
        """Addresses asked for, but the page's own and what lies in it."""
        asked = [one for one in self.said if one.get("method") == "Network.requestWillBeSent"]
        urls = [one["params"]["request"]["url"] for one in asked if one["params"].get("type") != "Document"]
        return [url for url in urls if not url.startswith("data:")]

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._back], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"Chromium is silent for {PATIENCE:g} s"
            received = os.read(self._back, 1 << 20)
            assert received, "Chromium has ended"
            self._buffer += received
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A tab of a Chromium that keeps its profile in a folder."""
    assert CHROMIUM
    (in_read, in_write), (out_read, out_write) = os.pipe(), os.pipe()
    # Chromium reads messages from descriptor 3 and writes to 4.
    script = f'exec "$0" "$@" 3<&{in_read} 4>&{out_write}'
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--remote-debugging-pipe", "--hide-scrollbars", f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(
        ["bash", "-c", script, CHROMIUM, *flags],
        pass_fds=(in_read, out_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(in_read)
    os.close(out_write)
    try:
        yield Page(in_write, out_read)
    finally:
        process.terminate()
        process.wait()
        os.close(in_write)
        os.close(out_read)
