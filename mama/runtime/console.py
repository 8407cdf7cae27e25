"""Log lines on stderr: our own, and the warnings of libraries."""

from __future__ import annotations

import logging
import os
import sys

from shards.files import legible

OWN = ("mama", "shards", "slurm")


def printable(text: str) -> str:
    """One line without control characters for the terminal: a message may quote the name of a file."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in legible(text))


class _OneLine(logging.Formatter):
    """The message alone, of our own loggers as one line; a traceback follows it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The message of a record."""
        return printable(record.message) if record.name.partition(".")[0] in OWN else record.message


def configure_logging() -> None:
    """Configure logging: one line a message, to stderr; ranks other than the first log warnings only.

    Without a terminal this also switches tqdm off; call it before a library with progress bars is imported.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # `shards.progress` writes lines there instead
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for library in ("httpx", "httpx2"):  # they log every request to a hub
        logging.getLogger(library).setLevel(logging.WARNING)
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger().setLevel(logging.WARNING)
