"""Chromium without a window, to see a page as a reader's browser does."""

from __future__ import annotations

import fcntl
import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PROBE = """<script>
const seen = top.document.body.dataset;
onerror = () => { seen.error = 1 };
addEventListener("load", () => {
  const images = [...document.images];
  seen.images = images.length;
  seen.broken = images.filter(i => !(i.complete && i.naturalWidth > 0)).length;
  seen.wide = document.documentElement.scrollWidth > innerWidth;
  const cut = e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX != "visible";
  seen.cut = [...document.querySelectorAll("main *")].filter(cut).length;
  seen.scrolls = [...document.querySelectorAll("main .scroll")].filter(cut).length;
  const loaded = performance.getEntriesByType("resource").map(e => e.name);
  seen.requests = loaded.filter(name => !name.startsWith("data:")).length;
})</script>"""
NARROWEST = 500  # pixels of a window of Chromium; a narrower page is a frame in it


def probe(page: Path, folder: Path, width: int) -> tuple[str, dict[str, str]]:
    """The page's DOM after loading, and what the probe saw.

    Images, broken ones, whether the page is wide, how many elements are cut (part of them only scrolling shows),
    of these scrolls those that are there for it, requests, and error if there was.
    """
    copy = folder / "probed.html"
    text = page.read_text().replace("<body>", "<body>" + PROBE)
    if width < NARROWEST:
        frame = f'<iframe style="width: {width}px; height: 900px" srcdoc="{html.escape(text)}"></iframe>'
        text = f"<!DOCTYPE html><html><body>{frame}</body></html>"
    copy.write_text(text)
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900"]
    done = subprocess.run(
        [*command, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, dict(re.findall(r'data-(images|broken|wide|cut|scrolls|requests|error)="([^"]*)"', done.stdout))


@contextmanager
def tensorboard(run: Path) -> Iterator[str]:
    """The address of the real TensorBoard on a run's folder."""
    command = [sys.executable, "-m", "tensorboard.main", "--host", "127.0.0.1", "--port", "0"]
    log = run / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen([*command, "--logdir", str(run / "tensorboard")], stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r" at (http://[\w.:]+/)", log.read_text())):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield found[1]
    finally:
        server.terminate()
        server.wait()


def loaded(page: str, folder: Path, charts: int) -> str:
    """The DOM of a page of TensorBoard. A browser in a hurry may leave before the cards are there: it comes back."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,3000"]
    for _ in range(5):
        done = subprocess.run(
            [*command, "--virtual-time-budget=20000", "--dump-dom", page],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        if done.stdout.count("<canvas") >= charts and "imageData" in done.stdout:
            break
    return done.stdout


class Page:
    """A page in a Chromium of its own, driven through its debugging pipe: real keys, widths, paper, no scripts.

    `said` are the messages of its console, refusals of its policy among them; `requests` the addresses that it asked
    for, but those of `data:`.
    """

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive = os.fdopen(send, "wb", buffering=0), os.fdopen(receive, "rb", buffering=0)
        self._count, self._session, self._rest = 0, "", b""
        self.said: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """The result of a command of the Chrome DevTools Protocol."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": arguments}
        if self._session:
            message["sessionId"] = self._session
        self._send.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._receive.fileno(), 2**20)
            assert more, "the browser has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        event: dict[str, Any] = json.loads(message)
        facts = event.get("params", {})
        if event.get("method") == "Log.entryAdded":
            self.said.append(facts["entry"]["text"])
        if event.get("method") == "Runtime.exceptionThrown":
            self.said.append(str(facts["exceptionDetails"]))
        if event.get("method") == "Network.requestWillBeSent" and not facts["request"]["url"].startswith("data:"):
            self.requests.append(facts["request"]["url"])
        return event

    def open(self, page: Path, width: int = 1280) -> None:
        """Load a file in a window of this width, a telephone's too."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.said.clear()
        self.requests.clear()
        self.call("Page.navigate", url=page.as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is in the page, as JSON."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def press(self, key: str, times: int = 1) -> None:
        """Press a key: Tab, Space, ArrowRight, ..."""
        code, text = {"Tab": (9, ""), "Space": (32, " "), "ArrowRight": (39, ""), "ArrowDown": (40, "")}[key]
        named = {"key": text or key, "code": key, "windowsVirtualKeyCode": code}
        for _ in range(times):
            self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **named)
            self.call("Input.dispatchKeyEvent", type="keyUp", **named)


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A `Page` whose Chromium keeps its files in `folder`, and ends with the block."""
    pipes = [*os.pipe(), *os.pipe()]
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in pipes]  # none is 3 or 4, which are the browser's
    for end in pipes:
        os.close(end)
    theirs = ends[0], ends[3]
    start = ["bash", "-c", f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}', "bash"]
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe"]
    process = subprocess.Popen([*start, *command], pass_fds=theirs, stderr=subprocess.DEVNULL)
    for end in theirs:
        os.close(end)
    try:
        yield Page(ends[1], ends[2])
    finally:
        process.terminate()
        process.wait()
