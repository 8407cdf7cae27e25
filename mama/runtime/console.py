"""What a user reads while something runs: our own lines, and of libraries what they warn of."""

from __future__ import annotations

import logging
import os
import sys


def start() -> None:
    """Log to stderr, one line a message; ranks other than the first only their warnings.

    Call it before libraries with progress bars are imported: where no terminal is, they are asked for none.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # `shards.progress` writes lines there
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for library in ("httpx", "httpx2"):  # they tell every request to a hub
        logging.getLogger(library).setLevel(logging.WARNING)
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger().setLevel(logging.WARNING)
