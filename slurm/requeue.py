"""Put this job back in the queue, from any of its tasks. Standard library only."""

from __future__ import annotations

import os
import subprocess
import time

TRIES = 3  # a controller that has just preempted a thousand jobs may be too busy to answer
SECONDS = 30.0  # that it gets to answer


def job_id() -> str | None:
    """The number of this job, `123_4` in an array; None if it is not one that was submitted from here to Slurm."""
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def requeue() -> bool:
    """Put this job back in the queue and return whether Slurm took it; its exit codes do not count from then on."""
    if (job := job_id()) is None:
        return False
    for number in range(TRIES):
        time.sleep(5 * number)
        try:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, timeout=SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return True
    return False
