"""Moved to `mama.errors`."""

from mama.errors import LaterError as LaterError
from mama.errors import RankError as RankError
from mama.errors import StoppedError as StoppedError
from mama.errors import TrainingError as TrainingError
