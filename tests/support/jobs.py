"""The results of submitted jobs."""

from __future__ import annotations

from typing import Any

import submitit
from submitit.core.utils import FailedJobError


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
