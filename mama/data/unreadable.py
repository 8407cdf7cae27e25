"""The budget of unreadable samples: a run goes on without a few, and ends at too many."""

from __future__ import annotations

import logging

from shards.errors import ShardError

log = logging.getLogger(__name__)

SHOWN = 3  # of the last errors, in the message that ends the run


class UnreadableSamples:
    """The studies that this process could not read, each logged once; more than `limit` of them end the run."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.errors: dict[str, str] = {}

    def add(self, key: str, error: ShardError) -> None:
        """Log study `key` once. Raises `ShardError` when more than `limit` studies are unreadable."""
        if key in self.errors:
            return
        self.errors[key] = str(error)
        log.warning("%s cannot be read and is skipped: %s", key, error)
        if len(self.errors) > self.limit:
            last = "; ".join(f"{key} ({self.errors[key]})" for key in list(self.errors)[-SHOWN:])
            raise ShardError(
                f"data.max_corrupt: {self.limit}, but {len(self.errors)} samples are unreadable; the last: {last}"
            )
