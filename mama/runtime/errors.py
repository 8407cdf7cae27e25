"""What ends a run besides a mistake in its configuration (`mama.settings.schema.ConfigError`) or its shards."""


class RankError(RuntimeError):
    """A rank failed or was killed; its own error is in the message."""


class TrainingError(RuntimeError):
    """The run cannot go on; the message says at which step and with which samples."""


class StoppedError(RuntimeError):
    """A signal ended the run, and everything is saved; the message says after how many steps."""


class LaterError(StoppedError):
    """It cannot go on now but will be able to: a job that says this goes back in the queue."""
