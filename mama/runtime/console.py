"""Log lines on stderr: our own, and the warnings of libraries."""

from __future__ import annotations

import logging
import os
import sys


def configure_logging() -> None:
    """Configure logging: one line a message, to stderr; ranks other than the first log warnings only.

    Without a terminal this also switches tqdm off; call it before a library with progress bars is imported.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # `shards.progress` writes lines there instead
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for library in ("httpx", "httpx2"):  # they log every request to a hub
        logging.getLogger(library).setLevel(logging.WARNING)
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger().setLevel(logging.WARNING)
