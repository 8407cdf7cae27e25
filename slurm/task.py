"""Which task of which job this process is, from the environment alone: it imports nothing that takes a while."""

from __future__ import annotations

import os


def first_task() -> bool:
    """Whether this process is the first task of its job, or of its step if `srun` started it; True outside of jobs."""
    name = "SUBMITIT_LOCAL_GLOBALID" if os.environ.get("SUBMITIT_EXECUTOR") == "local" else "SLURM_PROCID"
    return os.environ.get(name, "0") == "0"


def job_id() -> str | None:
    """The number of the Slurm job that this process is a task of, "123", or "123_4" in an array; None outside.

    In an array SLURM_JOB_ID will not do: the last task to start has that of the whole array.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
