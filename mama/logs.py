"""What a user reads while something runs: our own lines, and of libraries what they warn of."""

from __future__ import annotations

import logging
import os
import sys


def start() -> None:
    """Log to stderr, one line a message; ranks other than the first only their warnings."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for library in ("httpx", "httpx2"):  # they tell every request to a hub
        logging.getLogger(library).setLevel(logging.WARNING)
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger().setLevel(logging.WARNING)
