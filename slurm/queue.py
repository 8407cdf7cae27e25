"""What Slurm says of the user's jobs, and what can be asked of it: its own commands, read by machine.

Works with Slurm 22.05 and later, and without accounting. A Slurm that does not answer is a `SlurmError`, never an
empty queue.
"""

from __future__ import annotations

import getpass
import os
import re
import subprocess
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from slurm.profile import SlurmError

ANSWER_TIMEOUT = 120  # seconds; the commands themselves try again for up to a minute
FIRST_LOOK = 3.0  # seconds in which Slurm looks at a new job
SEPARATOR = "\x1f"  # stands in no name or comment
OF_A_COMMAND = re.compile(r"(SQUEUE|SACCT|SCANCEL|SCONTROL|SACCTMGR)_")
ENDS = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"),
)
HELD = ("SPECIAL_EXIT", "REQUEUE_HOLD")  # states of jobs that wait until they are released
# Ends after which the same work, submitted again, goes on, as nothing was wrong with it -> in plain words.
TAKEN_AWAY = {
    "BOOT_FAIL": "node failure",
    "CANCELLED": "cancelled",
    "NODE_FAIL": "node failure",
    "PREEMPTED": "preempted, and not coming back",
    "TIMEOUT": "time limit, and not coming back",
}
# What is said of jobs that have ended, and of the others of an array of which some have.
GONE = re.compile(r"Invalid job id|already (completing|completed|finished)|: No error$", re.IGNORECASE)

# Reasons (squeue(1), JOB REASON CODES) that no waiting cures -> in plain words, and what to change.
NEVER = {
    "AccountNotAllowed": "this account may not use the partition; change account or partition",
    "AccountingPolicy": "the accounting rules do not allow it; change account or qos",
    "BadConstraints": "no node of the partition has what it asks for; change constraint, gpus_per_node, cpus or memory",
    "DependencyNeverSatisfied": "a job that it waits for has failed or is gone",
    "InvalidAccount": "Slurm does not know the account; change account",
    "InvalidQOS": "Slurm does not know the qos, or you may not use it; change qos",
    "PartitionConfig": "the partition has no such nodes; ask for fewer nodes, tasks or cores, or change partition",
    "PartitionNodeLimit": "more nodes than the partition gives to one job, or has; change nodes or partition",
    "PartitionTimeLimit": "a longer time limit than the partition gives; lower timeout_min or change partition",
    "QOSNotAllowed": "the partition does not allow this qos; change qos or partition",
    "QOSTimeLimit": "a longer time limit than the qos gives; lower timeout_min or change qos",
    "job requeued in held state": "it was put back in the queue, and is held until `scontrol release`",
    "launch failed requeued held": "its node could not start it, and Slurm holds it until `scontrol release`",
}
PER_JOB = re.compile(r"(Assoc|QOS)M(ax|in)\w*(PerJob|PerNode)\w*|QOSMin\w+|Max\w+PerJob|MaxMemPerLimit")


@dataclass(frozen=True)
class QueuedJob:
    """A job, or one task of an array, that waits or runs."""

    id: str  # "123", or "123_4" for a task of an array
    state: str  # PENDING, RUNNING, COMPLETING, ...; PENDING too for what was put back in the queue and is held
    reason: str  # why it waits: Priority, Resources, Dependency, JobHeldUser, ...; "" if nothing is said
    node: str  # list of nodes; "" while it waits
    name: str
    comment: str
    restarts: int


@dataclass(frozen=True)
class EndedJob:
    """A job, or one task of an array, that has ended, from the accounting."""

    id: str
    state: str  # one of `ENDS`
    node: str  # list of nodes; "" if it never had one
    exit_code: int
    signal: int  # that ended it; 0: none


@dataclass(frozen=True)
class Limits:
    """How much may be submitted."""

    array_size: int  # MaxArraySize: the largest index of an array is one less
    jobs: int | None  # jobs and array tasks of the user that may wait or run; None: unlimited or unknown


def queue() -> list[QueuedJob]:
    """The user's own jobs that wait or run, each task of an array by itself. Raises `SlurmError`."""
    fields = ("JobArrayID", "State", "Reason", "NodeList", "Name", "Comment", "RestartCnt")
    layout = ",".join(f"{field}:{SEPARATOR}" for field in fields)
    # --all: also of partitions that are hidden, whose jobs would seem to have ended.
    lines = _answer("squeue", "--me", "--all", "--array", "--noheader", f"--Format={layout}").splitlines()
    jobs = [_queued(line) for line in lines if SEPARATOR in line]  # not "CLUSTER: name", where there are several
    return [job for job in jobs if job.state != "REVOKED"]  # it runs on another cluster of a federation


def ended(ids: Iterable[str]) -> dict[str, EndedJob]:
    """How those of the jobs `ids` that have ended did so, by id. Empty where there is no accounting."""
    wanted = set(ids)
    if not wanted:
        return {}
    numbers = ",".join(sorted({each.partition("_")[0] for each in wanted}))
    command = ("sacct", "--allocations", "--noheader", "--parsable2", "--format=JobID,State,NodeList,ExitCode")
    try:
        lines = _answer(*command, f"--jobs={numbers}").splitlines()
    except SlurmError:
        return {}
    jobs = [_ended(*line.split("|")) for line in lines if line.count("|") == 3]
    own = {job.id: job for job in jobs if job.state in ENDS}
    # Tasks of an array that never started have no row of their own: 123_[0-3,7%2], or 123.
    return {each: replace(own[row], id=each) for each in wanted if (row := _row_of(each, own))}


def limits(account: str | None = None, qos: str | None = None) -> Limits:
    """The limits of the cluster and, where there is accounting, of the user with this account and qos.

    None: whichever the user may have. Raises `SlurmError`.
    """
    configured = re.search(r"^MaxArraySize\s*=\s*(\d+)", _answer("scontrol", "show", "config"), re.MULTILINE)
    return Limits(array_size=int(configured[1]) if configured else 1001, jobs=_most_jobs(account, qos))


def release(ids: Iterable[str]) -> None:
    """Let held jobs start. A job that is not held, or has ended, stays as it is. Raises `SlurmError`.

    A job that no node suits is released too, though Slurm says then that it cannot start: see `waits_for_ever`.
    """
    try:
        _each("scontrol", "release", ids=ids)
    except SlurmError as error:
        if "partition configuration not available" not in str(error):
            raise


def cancel(ids: Iterable[str]) -> None:
    """End jobs, or take them out of the queue. A job that has ended stays as it is. Raises `SlurmError`."""
    _each("scancel", ids=ids)


def stop(ids: Iterable[str]) -> None:
    """Send SIGTERM to the tasks of running jobs, and nothing after it: `cancel` kills them after KillWait.

    A job that has ended stays as it is. Raises `SlurmError`.
    """
    _each("scancel", "--signal=TERM", ids=ids)


def never_starts(reason: str) -> str | None:
    """In plain words why a job that waits for `reason` will wait for ever; None if waiting may cure it."""
    reason = reason.replace("_", " ")
    if PER_JOB.fullmatch(reason):
        return f"a limit of one job in your account or qos ({reason}); ask for less, or change account or qos"
    return f"{NEVER[reason]} ({reason})" if reason in NEVER else None


def waits_for_ever(number: str) -> str | None:
    """In plain words why the job or array `number`, just submitted, will never start; None if it may.

    Slurm says why a job waits a moment after it was submitted. None too if it does not answer.
    """
    why = None
    deadline = time.monotonic() + FIRST_LOOK
    while time.monotonic() < deadline:
        time.sleep(0.3)
        try:
            reasons = [job.reason for job in queue() if job.id.partition("_")[0] == number and job.state == "PENDING"]
        except SlurmError:
            return None
        why = next((why for reason in reasons if (why := never_starts(reason))), None)
        if all(reasons) and "PartitionConfig" not in reasons:  # which a more exact reason may follow
            break
    return why


def _answer(*command: str) -> str:
    """What a command of Slurm prints. Raises `SlurmError` in one line if there is none, or it fails."""
    # Without the user's own defaults: SQUEUE_STATES=R would hide what waits, SCANCEL_INTERACTIVE ask for each job.
    environment = {name: value for name, value in os.environ.items() if not OF_A_COMMAND.match(name)}
    environment["SLURM_BITSTR_LEN"] = "0"  # lists of tasks in their full length
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=ANSWER_TIMEOUT, check=False
        )
    except FileNotFoundError:
        raise SlurmError(f"no {command[0]} command here; run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"Slurm does not answer: {command[0]} took more than {ANSWER_TIMEOUT} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        told = [line for line in lines if not GONE.search(line)] or lines  # of several jobs, what is not forgiven
        raise SlurmError(f"Slurm does not answer: {told[-1].strip()}")
    return done.stdout


def _queued(line: str) -> QueuedJob:
    number, state, reason, node, name, comment, restarts, *_ = (part.strip() for part in line.split(SEPARATOR))
    reason, comment = ("" if text in ("None", "(null)") else text for text in (reason, comment))
    state = "PENDING" if state in HELD else state
    return QueuedJob(number, state, reason, node, name, comment, int(restarts or 0))


def _ended(number: str, state: str, node: str, codes: str) -> EndedJob:
    code, _, signal = codes.partition(":")
    where = "" if node == "None assigned" else node
    return EndedJob(number, state.partition(" ")[0], where, int(code or 0), int(signal or 0))


def _row_of(job: str, rows: Collection[str]) -> str | None:
    """The row of the accounting that tells of `job`: its own, else one for several tasks of its array."""
    number, _, task = job.partition("_")
    if job in rows:
        return job
    groups = (row for row in rows if row == number or row.startswith(f"{number}_["))
    return next((row for row in groups if row == number or int(task or -1) in _tasks(row)), None)


def _tasks(row: str) -> set[int]:
    """{0, 1, 2, 3, 7} for "123_[0-3,7%2]", {0, 2, 4} for "123_[0-4:2]"."""
    ranges = re.findall(r"(\d+)(?:-(\d+))?(?::(\d+))?", row.partition("[")[2].partition("%")[0])
    return {task for a, b, step in ranges for task in range(int(a), int(b or a) + 1, int(step or 1))}


def _most_jobs(account: str | None, qos: str | None) -> int | None:
    """The smallest of the limits on submitted jobs that bind the user, as far as the accounting tells them."""
    show = ("sacctmgr", "--noheader", "--parsable2", "show")
    try:
        rows = _answer(*show, "assoc", f"user={getpass.getuser()}", "format=Account,DefaultQOS,MaxSubmit,GrpSubmit")
        own = [row for line in rows.splitlines() if account in (None, (row := line.split("|"))[0])]
        names = {qos} if qos else {row[1] for row in own} - {""}
        rows = _answer(*show, "qos", "format=Name,MaxSubmitPU,MaxSubmitPA,GrpSubmit") if names else ""
        of_qos = [row for line in rows.splitlines() if (row := line.split("|"))[0] in names]
    except SlurmError:
        return None
    values = [value for row in own for value in row[2:]] + [value for row in of_qos for value in row[1:]]
    # Not 0, of an account that is closed: nothing would ever be submitted, though another one is meant.
    return min((int(value) for value in values if value.isdecimal() and int(value)), default=None)


def _each(*command: str, ids: Iterable[str]) -> None:
    """Call a command on jobs, and forgive it those that have ended meanwhile."""
    numbers = list(ids)
    if not numbers:
        return
    try:
        _answer(*command, *(numbers if command[0] == "scancel" else [",".join(numbers)]))
    except SlurmError as error:
        if not GONE.search(str(error)):
            raise
