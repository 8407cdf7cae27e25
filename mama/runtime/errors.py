"""Moved to `mama.errors`."""

from mama.errors import LaterError, RankError, StoppedError, TrainingError  # noqa: F401
