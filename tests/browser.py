"""Chromium without a window, to see a page as a reader's browser does."""

from __future__ import annotations

import re
import shutil
import subprocess
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
onerror = () => { document.body.dataset.error = 1 };
addEventListener("load", () => {
  const images = [...document.images];
  document.body.dataset.images = images.length;
  document.body.dataset.broken = images.filter(i => !(i.complete && i.naturalWidth > 0)).length;
  document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;
  const loaded = performance.getEntriesByType("resource").map(e => e.name);
  document.body.dataset.requests = loaded.filter(name => !name.startsWith("data:")).length;
})</script>"""


def probe(page: Path, folder: Path, width: int) -> tuple[str, dict[str, str]]:
    """The page's DOM after loading, and what the probe saw: images, broken, wide, requests, and error if there was."""
    copy = folder / "probed.html"
    copy.write_text(page.read_text().replace("<body>", "<body>" + PROBE))
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900"]
    done = subprocess.run(
        [*command, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, dict(re.findall(r'data-(images|broken|wide|requests|error)="([^"]*)"', done.stdout))
