"""Submit a function as a job, and wait for what it returns."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from slurm.profile import Profile, SlurmError

logger = logging.getLogger(__name__)

_EXCEPTION = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Exit)\b")


class Resumable:
    """A call that submitit puts back in the queue when its job is preempted or reaches its time limit.

    Nothing is saved here: the function continues by itself when it is called again with the same
    arguments. submitit calls `checkpoint` in a signal handler, on the job's first task only, where
    anything that needs the other tasks would hang.
    """

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function = function
        self.args = args

    def __call__(self) -> Any:
        return self.function(*self.args)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        return submitit.helpers.DelayedSubmission(self)


def submit(
    function: Callable[..., Any], *args: Any, profile: Profile, folder: str | Path, name: str = "mama"
) -> submitit.Job[Any]:
    """Submit `function(*args)` as a job; returns at once.

    The function and its arguments are pickled and must be importable by the job's Python, which is
    the one that runs now. Logs and the result go to `folder`/jobs/<job id>; on a cluster `folder` must
    lie on a file system that the nodes share. With more than one task in the profile, every task
    calls the function: see `slurm.env.export_distributed_environment`.

    Raises `SlurmError` when the job cannot be submitted.
    """
    jobs = Path(folder).absolute() / "jobs" / "%j"
    try:
        executor = submitit.AutoExecutor(folder=jobs, cluster=profile.cluster)
        executor.update_parameters(**_parameters(profile, name))
        job = executor.submit(Resumable(function, *args))
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        raise SlurmError(f"{name}: the job cannot be submitted: {_last_line(str(error))}") from error
    except RuntimeError as error:
        if "srun" not in str(error):
            raise
        message = "cluster: 'slurm', but there is no srun command here; submit on a login node or set cluster: local"
        raise SlurmError(message) from error
    logger.info("job %s (%s, %s): log %s", job.job_id, name, profile.cluster, job.paths.stderr)
    return job


def wait(job: submitit.Job[Any]) -> Any:
    """Wait for the job's end; returns what the function returned in the first task.

    Raises `SlurmError` with the last line of the error and the log that holds the rest, when a task failed.
    """
    job.wait()
    tasks = [job.task(number) for number in range(job.num_tasks)]
    errors = [(task, task.exception()) for task in tasks]
    # When one task raises, the others are killed: the cause is the error that was raised.
    errors.sort(key=lambda pair: not isinstance(pair[1], FailedJobError))
    for task, error in errors:
        if error is not None:
            raise SlurmError(f"job {job.job_id} failed: {_cause(task, error)}; its log is {task.paths.stderr}")
    return tasks[0].result()


def _parameters(profile: Profile, name: str) -> dict[str, Any]:
    shared = {
        "name": name,
        "nodes": profile.nodes,
        "tasks_per_node": profile.tasks_per_node,
        "gpus_per_node": profile.gpus_per_node or None,  # a cluster without GPUs refuses even a 0
        "cpus_per_task": profile.cpus_per_task,
        "mem_gb": profile.mem_gb,
        "timeout_min": profile.timeout_min,
    }
    only_slurm = {
        "slurm_partition": profile.partition,
        "slurm_account": profile.account,
        "slurm_additional_parameters": profile.additional or None,
    }
    parameters = shared | (only_slurm if profile.cluster == "slurm" else {})
    return {key: value for key, value in parameters.items() if value is not None}


def _cause(task: submitit.Job[Any], error: Exception) -> str:
    """The line that says why: the exception's own, or the log's last where the task died without one."""
    if not isinstance(error, FailedJobError):
        # A requeued job appends to its log: what stands far above belongs to an earlier start.
        tail = "\n".join((task.stderr() or "").strip().splitlines()[-20:])
        return _last_line(tail) if tail else "it ended without a result and without a word (killed?)"
    outcome = str(error).split("-" * 22)  # submitit frames the traceback by two such rules
    return _last_line(outcome[1] if len(outcome) > 2 else str(error))


def _last_line(text: str) -> str:
    """The last line that names an exception (its message may go on for lines), or else the last line."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if _EXCEPTION.match(line)]
    return (named or lines or ["no message"])[-1].strip()
