"""Submit a function as a job, or as an array of jobs, through submitit."""

from __future__ import annotations

import gc
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from slurm import blocked_signals
from slurm.batch_script import environment_for_sbatch, notice_s, sbatch_options, script
from slurm.profile import Profile, SlurmError

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
        # submitit's handlers are installed now: that of SIGUSR2 requeues the job, but that of SIGTERM would forget it.
        signal.signal(signal.SIGTERM, blocked_signals.note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked_signals.SIGNALS)
        gc.freeze()  # what was imported with the function stays: later collections, and that at the end, leave it out
        return self.function(*self.args)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """The same call again, for submitit to requeue."""
        return submitit.helpers.DelayedSubmission(self)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What Slurm is asked for with some calls: resources, places, and when they may start.

    - dependency: of the jobs on others, as sbatch takes it; "afterok:12". A job whose dependency fails is cancelled.
    - at_once: jobs of an array that run at the same time; None: the profile's array_parallelism.
    - hold: the jobs wait until `slurm.queue.release`. A job finds its call only once `submit_calls` has returned, and
      one that starts and does not find it ends after a minute: held, nothing is left that runs if this process is
      killed.
    - code: a folder, from `slurm.snapshot.snapshot`, that the jobs import mama, shards and slurm from.
    """

    profile: Profile
    folder: str | Path  # logs and results go to `folder`/jobs/<job id>
    name: str = "mama"
    comment: str = ""
    dependency: str = ""
    at_once: int | None = None
    hold: bool = False
    code: Path | None = None

    @property
    def place(self) -> Path:
        """submitit's folder of each job, with its pattern for the job's id."""
        return Path(self.folder).absolute() / "jobs" / "%j"

    def options(self, size: int | None) -> dict[str, Any]:
        """Long option of sbatch -> value, for an array of `size` jobs; None: a job that is no array."""
        own: dict[str, Any] = {
            "job-name": self.name,
            "comment": self.comment or None,
            "dependency": self.dependency or None,
            "kill-on-invalid-dep": "yes" if self.dependency else None,
            "hold": self.hold,
        }
        if size is not None:
            at_once = self.at_once or self.profile.array_parallelism
            own["array"] = f"0-{size - 1}" + (f"%{at_once}" if at_once else "")
        return sbatch_options(self.profile) | own

    def script(self, size: int | None) -> str:
        """The batch script of an array of `size` jobs, or of one job; nothing is submitted or written."""
        self.profile.require_cluster()
        pattern = "%j" if size is None else "%A_%a"
        # Absolute: in a container, or after a `cd` among the setup lines, the task starts in another folder.
        code = None if self.code is None else self.code.absolute()
        return script(self.options(size), self.profile, self.place.parent, pattern, code)


def submit(
    function: Callable[..., Any],
    *args: Any,
    profile: Profile,
    folder: str | Path,
    name: str = "mama",
    dependency: str = "",
    code: Path | None = None,
) -> submitit.Job[Any]:
    """Submit `function(*args)` as a job and return without waiting for it.

    The job unpickles the function and its arguments, and runs the Python that runs now. Logs and the result go to
    `folder`/jobs/<job id>; on a cluster the nodes must share the file system of `folder`. If the profile has more than
    one task, each of them calls the function: see `slurm.rank_environment.export_distributed_environment`.
    dependency, code: as in `Request`; on a cluster alone.

    Raises `SlurmError` if the job cannot be submitted.
    """
    if profile.cluster == "slurm":
        request = Request(profile=profile, folder=folder, name=name, dependency=dependency, code=code)
        (job,) = _submit_to_slurm([(function, args)], request, None)
    else:
        with _submission_errors(name):
            job = _local_executor(profile, folder, name).submit(Resumable(function, *args))
    logger.info("job %s (%s, %s): log %s", job.job_id, name, profile.cluster, job.paths.stderr)
    return job


def submit_calls(
    calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], request: Request
) -> list[submitit.Job[Any]]:
    """Submit an array of jobs, one for each (function, arguments), in a single call of sbatch; also for a single one.

    Each job gets the resources of the whole profile, and is named <number>_<index>; the rest is as in `submit`.
    Raises `SlurmError` if the jobs cannot be submitted.
    """
    jobs = _submit_to_slurm(calls, request, len(calls))
    logger.info("array %s (%s, %d jobs)", jobs[0].job_id.partition("_")[0], request.name, len(jobs))
    return jobs


def submit_array(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    then: Callable[..., Any],
    *then_arguments: Any,
    profile: Profile,
    folder: str | Path,
    name: str = "mama",
    code: Path | None = None,
) -> tuple[list[submitit.Job[Any]], submitit.Job[Any]]:
    """Submit an array of jobs, `function(*each)` for each of `arguments`, and a last job `then(*then_arguments)`.

    The last job starts when all jobs of the array have ended, even if they failed, so that it can complete their work.
    Each job gets the resources of the whole profile. Returns the array's jobs and the last one without waiting for
    them; the rest is as in `submit`.

    Raises `SlurmError` if the profile suits no array or a job cannot be submitted; without its last job the array is
    cancelled.
    """
    profile.require_cluster()
    profile.require_one_task()
    calls = [(function, each) for each in arguments]
    jobs = submit_calls(calls, Request(profile=profile, folder=folder, name=name, code=code))
    number = jobs[0].job_id.partition("_")[0]
    after = f"afterany:{number}"
    try:
        end = f"{name}-end"
        last = submit(then, *then_arguments, profile=profile, folder=folder, name=end, dependency=after, code=code)
    except SlurmError:
        subprocess.run(["scancel", number], capture_output=True)
        raise
    return jobs, last


def _submit_to_slurm(
    calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], request: Request, size: int | None
) -> list[submitit.Job[Any]]:
    """Submit the calls with one call of sbatch. Nothing is left on disk if it refuses. Raises `SlurmError`."""
    text = request.script(size)
    aside = request.place.parent / f".{uuid.uuid4().hex}"
    with _submission_errors(request.name):
        aside.mkdir(parents=True)
        try:
            (aside / "script").write_text(text)
            for index, (function, args) in enumerate(calls):
                delayed = submitit.core.utils.DelayedSubmission(Resumable(function, *args))
                delayed.set_timeout(_minutes_of_a_timeout(request.profile), MAX_TIMEOUTS)  # type: ignore[arg-type]
                delayed.dump(aside / str(index))
            number = _sbatch(aside / "script", request.options(size))
            ids = [number] if size is None else [f"{number}_{index}" for index in range(size)]
            tasks = list(range(request.profile.tasks))
            jobs: list[submitit.Job[Any]] = [
                submitit.SlurmJob(folder=request.place, job_id=id, tasks=tasks) for id in ids
            ]
            for index, each in enumerate(jobs):
                each.paths.move_temporary_file(aside / str(index), "submitted_pickle")
            jobs[0].paths.move_temporary_file(aside / "script", "submission_file")
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return jobs


def _sbatch(script: Path, options: dict[str, Any]) -> str:
    """Submit a script and return the number of the job. Raises `FailedSubmissionError`."""
    command = ["sbatch", str(script)]
    environment = environment_for_sbatch(os.environ, options)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise SlurmError(
            "cluster: 'slurm', but there is no sbatch command here; submit on a login node or set cluster: local"
        ) from error
    number = re.search(r"job (\d+)", done.stdout)
    if done.returncode or not number:
        raise FailedSubmissionError(done.stderr or done.stdout)
    return number[1]


def _minutes_of_a_timeout(profile: Profile) -> float:
    """The time limit that submitit is told.

    Of a limit of m minutes it counts as timed out what ran for min(0.8 m, m - 10): every job of at most 10 minutes,
    also one that was preempted at once. With the value returned here that time is nine tenths of the time that a job
    has before it is signalled.
    """
    ran = 0.9 * (profile.timeout_min - notice_s(profile) / 60)
    return max(ran / 0.8, ran + 10)


def _local_executor(profile: Profile, folder: str | Path, name: str) -> submitit.AutoExecutor:
    place = Path(folder).absolute() / "jobs" / "%j"
    python = shlex.join([sys.executable, "-I", "-S", blocked_signals.__file__, sys.executable])
    executor = submitit.AutoExecutor(
        folder=place, cluster="local", local_max_num_timeout=MAX_TIMEOUTS, local_python=python
    )
    parameters = {
        "name": name,
        "nodes": 1,
        "tasks_per_node": profile.tasks_per_node,
        "gpus_per_node": profile.gpus_per_node or None,
        "timeout_min": profile.timeout_min,
    }
    executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
    return executor


@contextmanager
def _submission_errors(name: str) -> Iterator[None]:
    """Report in one line why the job `name` cannot be submitted."""
    try:
        yield
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        raise SlurmError(f"{name}: the job cannot be submitted: {_last_line(str(error))}") from error


def _last_line(text: str) -> str:
    """The last line that names an exception, whose message may have more lines; else the last line."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if _EXCEPTION.match(line)]
    return (named or lines or ["no message"])[-1].strip()
