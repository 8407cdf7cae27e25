"""Chromium without a window, to see a page as a reader's browser does."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
