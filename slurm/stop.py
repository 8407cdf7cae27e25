"""Ask jobs that run to end by themselves."""

from __future__ import annotations

from collections.abc import Iterable

from slurm.queue import _each


def stop(ids: Iterable[str]) -> None:
    """Send SIGTERM to the tasks of running jobs, and nothing after it: `scancel` alone kills them after KillWait.

    A job that has ended stays as it is. Raises `SlurmError`.
    """
    _each("scancel", "--signal=TERM", ids=ids)
