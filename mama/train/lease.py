"""One training at a time in a run folder: a lease in `alive/`, which rank 0 holds and keeps touching.

Leases are numbered, and the process that creates the next number holds it: creating a file that must not exist is
atomic on every file system; replacing an old one is not. The file with the highest number records the holder, or
that the lease is over. A holder on this machine is dead when its process is gone. One on another machine is dead when
its file has not changed for `SILENCE` seconds by our own clock: clocks of machines differ, and network file systems
show a change up to a minute late.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mama.errors import ConfigError, LaterError, StoppedError, TrainingError
from mama.run.files import make_folder
from mama.runtime import preemption
from mama.runtime.ending import cleaned_up
from mama.train.heartbeat import BEAT, FOLDER
from shards.files import atomic_write
from shards.progress import repeated

log = logging.getLogger(__name__)

SILENCE = 120.0  # seconds without a change by another machine, after which its process counts as dead
PATIENCE = 30.0  # seconds to wait for a living holder, which may be saving for the last time
IN_JOB = 900.0  # the same for an earlier start of our own Slurm job, which Slurm will end
POLL = 0.5  # seconds


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease; `started` and `machine` distinguish it from another one with the same number."""

    host: str
    pid: int
    started: str  # clock ticks after the machine's start
    machine: str  # boot, and namespace of process numbers
    job: str  # Slurm's number, or empty

    @staticmethod
    def this() -> Holder:
        """This process."""
        pid, job = os.getpid(), os.environ.get("SLURM_JOB_ID", "")
        return Holder(socket.gethostname(), pid, _started(pid) or "", _machine(), job)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (Slurm job {self.job})" if self.job else "")

    def is_gone(self) -> bool | None:
        """Whether the process has ended; None if it runs on another machine or in another container."""
        return None if self.machine != _machine() else _started(self.pid) != self.started


@dataclass(frozen=True)
class Lease:
    """Lease `number` of a run folder, held by this process."""

    run: Path
    number: int
    holder: Holder

    @property
    def path(self) -> Path:
        """The file of the lease."""
        return _path(self.run, self.number)

    def check(self) -> None:
        """Raises `TrainingError` if another process has taken over, because this one was stopped for long."""
        newest = _newest(self.run)
        if newest > self.number:
            holder = _read(_path(self.run, newest))[0] or "another process"
            raise TrainingError(
                f"{self.run}: {holder} has taken over, as this process gave no sign of life; it ends and writes nothing"
            )

    def beat(self) -> None:
        """Touch the file, to show that this process is alive."""
        with suppress(OSError):
            os.utime(self.path)

    def release(self) -> None:
        """Mark the lease as over, unless another process has taken it."""
        with suppress(OSError):
            if _newest(self.run) == self.number:
                atomic_write(self.path, _document(self.holder, over=True))


@contextmanager
def held(run: Path) -> Iterator[Lease]:
    """Hold the lease of a run folder within the block, after waiting for a holder that may be ending.

    Raises `ConfigError` if that one goes on, `LaterError` if it is an earlier start of the same Slurm job, and
    `StoppedError` if a signal comes meanwhile.
    """
    lease = _take(run)
    with cleaned_up(lease.release), repeated(BEAT, lease.beat):
        yield lease


def _take(run: Path) -> Lease:
    make_folder(run / FOLDER)
    me = Holder.this()
    waiting: _Wait | None = None
    while True:
        newest = _newest(run)
        if not newest or (waiting and waiting.number == newest and waiting.is_over()):
            if lease := _create(run, newest + 1, me):
                return lease
            continue
        if waiting is None or waiting.number != newest:
            waiting = _Wait(run, newest, me)
            continue
        waiting.refuse()
        time.sleep(POLL)


class _Wait:
    """Waiting for the end of lease `number`, which another process holds or held."""

    def __init__(self, run: Path, number: int, me: Holder) -> None:
        self.run, self.number, self.me = run, number, me
        self.began = self.changed = time.monotonic()
        self.holder, self.content = _read(_path(run, number))
        self.seen_alive = self.logged = False

    def is_over(self) -> bool:
        """Whether the holder has released the lease, or died."""
        holder, content = _read(_path(self.run, self.number))
        if content != self.content:
            self.holder, self.content, self.changed, self.seen_alive = holder, content, time.monotonic(), True
        if holder is None and content[0]:  # released
            return True
        gone = holder.is_gone() if holder else None
        if gone is False:
            self.seen_alive = True
        return time.monotonic() - self.changed > SILENCE if gone is None else gone

    def refuse(self) -> None:
        """Raise if a signal came, or the holder has gone on for longer than we wait."""
        in_job = self.holder is not None and self.holder.job != "" and self.holder.job == self.me.job
        who = self.holder or "an unknown process"
        if not self.logged:
            self.logged = True
            log.warning("%s is in use by %s; waiting for it to end", self.run, who)
        if preemption.signal_received():
            raise StoppedError(f"a signal ended it while it waited for {who}; run it again to continue")
        waited = time.monotonic() - self.began
        if in_job and waited > IN_JOB:
            raise LaterError(f"{self.holder}, an earlier start of this job, still trains in {self.run}")
        if not in_job and self.seen_alive and waited > PATIENCE:
            raise ConfigError(
                f"name: {self.run} is being trained by {who}; wait for it, end it, or give another name=..."
            )


def _create(run: Path, number: int, me: Holder) -> Lease | None:
    """Create lease `number`; None if another process was faster."""
    draft, path = run / FOLDER / f".{uuid.uuid4().hex}", _path(run, number)
    atomic_write(draft, _document(me))
    try:
        os.link(draft, path)
    except FileExistsError:
        if draft.stat().st_nlink != 2:  # else it is ours: NFS has repeated a request whose answer was lost
            return None
    except OSError:  # this file system has no hard links
        try:
            with path.open("xb") as file:
                file.write(_document(me))
        except FileExistsError:
            return None
    finally:
        draft.unlink()
    if _newest(run) != number:  # this process was stopped meanwhile, and others have gone on
        path.unlink(missing_ok=True)
        return None
    for old in (run / FOLDER).glob("lease-*.json"):
        if old != path:
            old.unlink(missing_ok=True)
    return Lease(run, number, me)


def _document(holder: Holder, over: bool = False) -> bytes:
    return json.dumps({**asdict(holder), "over": over}).encode()


def _newest(run: Path) -> int:
    """The highest number of a lease; 0 if there is none."""
    names = (name for name in os.listdir(run / FOLDER) if name.startswith("lease-") and name.endswith(".json"))
    return max((int(name[6:-5]) for name in names if name[6:-5].isdecimal()), default=0)


def _path(run: Path, number: int) -> Path:
    return run / FOLDER / f"lease-{number:06d}.json"


def _read(path: Path) -> tuple[Holder | None, tuple[str, int]]:
    """The holder, and the file's text and time of change. Without a holder: released, or unreadable if no text."""
    try:
        with path.open() as file:  # a network file system may answer from its cache unless the file is opened
            text, changed = file.read(), os.fstat(file.fileno()).st_mtime_ns
        found: dict[str, Any] = json.loads(text)
        over = found.pop("over")
        return (None if over else Holder(**found)), (text, changed)
    except OSError:
        return None, ("", 0)
    except (AttributeError, KeyError, TypeError, ValueError):  # its machine lost power during the write
        return None, ("", changed)


def _started(pid: int) -> str | None:
    """When a process started; None if there is none, or only a zombie."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
