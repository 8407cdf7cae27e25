"""Status files: what the last process that worked on a step of a point left behind."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from mama.errors import ConfigError
from mama.run.files import read_object, write_json
from shards.from_json import from_json

CLOCK = 60.0  # seconds by which the clock may be set while a process runs
Word = Literal["running", "done", "failed", "stopped"]


@dataclass(frozen=True)
class Status:
    """The content of a status file.

    failed: it raised an error, `cause`. stopped: a signal ended it, everything is saved, and nothing has put it back in
    the queue.
    """

    state: str  # of Word
    settings: str  # digest of the settings that its result depends on
    job: str | None  # Slurm's number of the job, "123" or "123_4"; None on the local machine
    node: str
    pid: int  # of its first task
    starts: int  # times that it was started with these settings
    since: str  # time of the last change, ISO 8601 in UTC
    cause: str | None = None  # in one line


def read(path: Path) -> Status | None:
    """The status in a file; None if there is none, or if it is damaged: the step is then run again, which is safe."""
    try:
        return from_json(Status, read_object(path))
    except (ConfigError, TypeError, ValueError, AttributeError):
        return None


def start(path: Path, settings: str, job: str | None) -> Status:
    """Record that this process works on the step."""
    before = read(path)
    starts = before.starts if before and before.settings == settings else 0
    status = Status("running", settings, job, socket.gethostname(), os.getpid(), starts + 1, _now())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(status))
    return status


def end(path: Path, status: Status, state: Word, cause: str | None = None) -> None:
    """Record how the step ended. The first failure of several tasks of a job stays: the later ones follow from it."""
    before = read(path)
    if before and before.state == "failed" and (before.job, before.starts) == (status.job, status.starts):
        return
    write_json(path, asdict(replace(status, state=state, cause=cause, since=_now())))


def is_alive(status: Status) -> bool:
    """Whether the process of a status "running" without a job still lives, as far as this machine can know."""
    if status.node != socket.gethostname():
        return True
    try:
        os.kill(status.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # After this machine has started anew, another process may have the number.
    return _began(status.pid) <= datetime.fromisoformat(status.since).timestamp() + CLOCK


def _began(pid: int) -> float:
    """When a process began, in seconds since 1970; 0 where the system does not tell."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        lines = Path("/proc/stat").read_text().splitlines()
        boot = next(int(line.split()[1]) for line in lines if line.startswith("btime "))
    except (OSError, ValueError, LookupError, StopIteration):
        return 0.0
    return boot + ticks / os.sysconf("SC_CLK_TCK")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
