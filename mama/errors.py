"""Errors that the command line reports in one line, besides those of `shards` and `slurm`."""


class ConfigError(ValueError):
    """A user's mistake; the message is one line: field, value, fix."""


class RankError(RuntimeError):
    """A rank failed or was killed; the message holds that rank's own error."""


class TrainingError(RuntimeError):
    """Training cannot continue; the message names the step and the samples."""


class HungError(TrainingError):
    """A process has made no progress for too long; the message names it."""


class StoppedError(RuntimeError):
    """A signal stopped the run, which continues when it is run again. The message names the step."""


class LaterError(StoppedError):
    """The run cannot continue now, but can later: its job goes back in the queue."""
