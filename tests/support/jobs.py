"""Wait for submitted jobs, and for what they do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import submitit
from submitit.core.utils import FailedJobError


def wait_for(ready: Callable[[], Any], seconds: float = 240) -> Any:
    """Ask again and again until the answer is not empty, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def result_of(job: submitit.Job[Any]) -> Any:
    """Wait for a job and return the result of its first task.

    Raises the error of a task that raised one (`FailedJobError`), else that of one that died
    (`UncompletedJobError`): when a task raises, Slurm kills the others.
    """
    job.wait()
    tasks = [job.task(number) for number in range(job.num_tasks)]
    errors = [error for task in tasks if (error := task.exception())]
    if errors:
        raise next((error for error in errors if isinstance(error, FailedJobError)), errors[0])
    return tasks[0].result()
