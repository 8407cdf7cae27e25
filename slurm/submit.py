"""Submit a function as a job or as an array of them, and wait for what it returns."""

from __future__ import annotations

import logging
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from slurm import blocked_signals
from slurm.profile import CLUSTERS, Profile, SlurmError

logger = logging.getLogger(__name__)

# How often a job that reached its time limit goes back in the queue; submitit's own 3 would end a long run.
MOST_TIMEOUTS = 100
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
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked_signals.SIGNALS)  # submitit's handlers stand now
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
    calls the function: see `slurm.rank_environment.export_distributed_environment`.

    Raises `SlurmError` when the job cannot be submitted.
    """
    with _told_in_one_line(name):
        job = _executor(profile, folder, name).submit(Resumable(function, *args))
    logger.info("job %s (%s, %s): log %s", job.job_id, name, profile.cluster, job.paths.stderr)
    return job


def submit_array(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    then: Callable[..., Any],
    *then_arguments: Any,
    profile: Profile,
    folder: str | Path,
    name: str = "mama",
) -> tuple[list[submitit.Job[Any]], submitit.Job[Any]]:
    """Submit an array of jobs, `function(*each)` for each of `arguments`, and one job `then(*then_arguments)`.

    That last job starts when all of the array have ended, however they ended, so that it can make good what
    they left undone. Every job asks for all that the profile names. Returns the array's jobs and the last
    one at once; where the last one is refused, the array is taken back. The rest is as in `submit`.
    """
    profile.require_array()
    with _told_in_one_line(name):
        executor = _executor(profile, folder, name)
        with executor.batch():
            jobs = [executor.submit(Resumable(function, *each)) for each in arguments]
    number = jobs[0].job_id.partition("_")[0]
    try:
        with _told_in_one_line(f"{name}-end"):
            executor.update_parameters(name=f"{name}-end", slurm_dependency=f"afterany:{number}")
            last = executor.submit(Resumable(then, *then_arguments))
    except SlurmError:
        subprocess.run(["scancel", number], capture_output=True)
        raise
    logger.info("array %s (%s, %d jobs): logs in %s", number, name, len(jobs), jobs[0].paths.folder.parent)
    logger.info("job %s (%s-end, after them): log %s", last.job_id, name, last.paths.stderr)
    return jobs, last


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


def _executor(profile: Profile, folder: str | Path, name: str) -> submitit.AutoExecutor:
    place = Path(folder).absolute() / "jobs" / "%j"
    # Without PYTHON* variables and site packages, so that hardly any time is left for a signal before it is held back.
    python = shlex.join([sys.executable, "-I", "-S", blocked_signals.__file__, sys.executable])
    settings: dict[str, Any] = {}
    for cluster in CLUSTERS:
        settings |= {f"{cluster}_max_num_timeout": MOST_TIMEOUTS, f"{cluster}_python": python}
    try:
        executor = submitit.AutoExecutor(folder=place, cluster=profile.cluster, **settings)
    except RuntimeError as error:
        if "srun" not in str(error):
            raise
        message = "cluster: 'slurm', but there is no srun command here; submit on a login node or set cluster: local"
        raise SlurmError(message) from error
    executor.update_parameters(**_parameters(profile, name))
    return executor


@contextmanager
def _told_in_one_line(name: str) -> Iterator[None]:
    try:
        yield
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        raise SlurmError(f"{name}: the job cannot be submitted: {_last_line(str(error))}") from error


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
        "slurm_signal_delay_s": min(profile.grace_s, profile.timeout_min * 30),
        "slurm_additional_parameters": profile.additional or None,
        "slurm_srun_args": ["--kill-on-bad-exit=1"],  # a rank that dies would leave the others waiting
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
