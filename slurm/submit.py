"""Submit a function as a job, or as an array of jobs, through submitit."""

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

MAX_TIMEOUTS = 100  # requeues after the time limit; submitit's default of 3 would end a long run
_EXCEPTION = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Exit)\b")


class Resumable:
    """A call that submitit requeues when its job is preempted or reaches its time limit.

    `checkpoint` saves nothing: the function itself resumes when it is called again with the same arguments. submitit
    calls it in a signal handler of the job's first task, where anything that needs the other tasks would hang.
    """

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function = function
        self.args = args

    def __call__(self) -> Any:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked_signals.SIGNALS)  # submitit's handlers are installed now
        return self.function(*self.args)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """The same call again, for submitit to requeue."""
        return submitit.helpers.DelayedSubmission(self)


def submit(
    function: Callable[..., Any], *args: Any, profile: Profile, folder: str | Path, name: str = "mama"
) -> submitit.Job[Any]:
    """Submit `function(*args)` as a job and return without waiting for it.

    The job unpickles the function and its arguments, and runs the Python that runs now. Logs and the result go to
    `folder`/jobs/<job id>; on a cluster the nodes must share the file system of `folder`. If the profile has more than
    one task, each of them calls the function: see `slurm.rank_environment.export_distributed_environment`.

    Raises `SlurmError` if the job cannot be submitted.
    """
    with _submission_errors(name):
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
    """Submit an array of jobs, `function(*each)` for each of `arguments`, and a last job `then(*then_arguments)`.

    The last job starts when all jobs of the array have ended, even if they failed, so that it can complete their work.
    Each job gets the resources of the whole profile. Returns the array's jobs and the last one without waiting for
    them; the rest is as in `submit`.

    Raises `SlurmError` if the profile suits no array or a job cannot be submitted; without its last job the array is
    cancelled.
    """
    profile.require_array()
    with _submission_errors(name):
        executor = _executor(profile, folder, name)
        with executor.batch():
            jobs = [executor.submit(Resumable(function, *each)) for each in arguments]
    number = jobs[0].job_id.partition("_")[0]
    try:
        with _submission_errors(f"{name}-end"):
            executor.update_parameters(name=f"{name}-end", slurm_dependency=f"afterany:{number}")
            last = executor.submit(Resumable(then, *then_arguments))
    except SlurmError:
        subprocess.run(["scancel", number], capture_output=True)
        raise
    logger.info("array %s (%s, %d jobs): logs in %s", number, name, len(jobs), jobs[0].paths.folder.parent)
    logger.info("job %s (%s-end, after them): log %s", last.job_id, name, last.paths.stderr)
    return jobs, last


def _executor(profile: Profile, folder: str | Path, name: str) -> submitit.AutoExecutor:
    place = Path(folder).absolute() / "jobs" / "%j"
    # -I -S: start without PYTHON* variables and site packages, to block signals as early as possible.
    python = shlex.join([sys.executable, "-I", "-S", blocked_signals.__file__, sys.executable])
    settings: dict[str, Any] = {}
    for cluster in CLUSTERS:
        settings |= {f"{cluster}_max_num_timeout": MAX_TIMEOUTS, f"{cluster}_python": python}
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
def _submission_errors(name: str) -> Iterator[None]:
    """Report in one line why the job `name` cannot be submitted."""
    try:
        yield
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        raise SlurmError(f"{name}: the job cannot be submitted: {_last_line(str(error))}") from error


def _parameters(profile: Profile, name: str) -> dict[str, Any]:
    shared = {
        "name": name,
        "nodes": profile.nodes,
        "tasks_per_node": profile.tasks_per_node,
        "gpus_per_node": profile.gpus_per_node or None,  # clusters without GPUs refuse even a 0
        "cpus_per_task": profile.cpus_per_task,
        "mem_gb": profile.mem_gb,
        "timeout_min": profile.timeout_min,
    }
    only_slurm = {
        "slurm_partition": profile.partition,
        "slurm_account": profile.account,
        "slurm_signal_delay_s": min(profile.grace_s, profile.timeout_min * 30),
        "slurm_additional_parameters": profile.additional or None,
        # Else the other ranks would wait for one that died; and a cluster's WaitTime would end the job soon after the
        # first of its tasks has nothing left to do.
        "slurm_srun_args": ["--kill-on-bad-exit=1", "--wait=0"],
    }
    parameters = shared | (only_slurm if profile.cluster == "slurm" else {})
    return {key: value for key, value in parameters.items() if value is not None}


def _last_line(text: str) -> str:
    """The last line that names an exception, whose message may have more lines; else the last line."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if _EXCEPTION.match(line)]
    return (named or lines or ["no message"])[-1].strip()
