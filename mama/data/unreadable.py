"""Samples that cannot be read: a run goes on without a few of them, and not without many."""

from __future__ import annotations

import logging

from shards.schema import ShardError

log = logging.getLogger(__name__)

NAMED = 3  # of the last ones, in the message that ends the run


class Corrupt:
    """The studies that this process could not read, each logged once; more than `limit` of them end the run."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.errors: dict[str, str] = {}

    def add(self, key: str, error: ShardError) -> None:
        """Raises `ShardError` when there are too many."""
        if key in self.errors:
            return
        self.errors[key] = str(error)
        log.warning("%s cannot be read and is passed over: %s", key, error)
        if len(self.errors) > self.limit:
            last = "; ".join(f"{key} ({self.errors[key]})" for key in list(self.errors)[-NAMED:])
            raise ShardError(
                f"data.max_corrupt: {self.limit}, and {len(self.errors)} samples could not be read; the last: {last}"
            )
