"""One training at a time in a run folder: a lease in `alive/`, held by rank 0 for as long as it gives signs of life.

Leases are numbered, and whoever creates the next number has it: creating a file that must not be there is one
step on every file system, which removing an old one and writing a new one are not. The file with the highest
number says who holds the folder, or that nobody does any more. A holder on this machine is dead when its process
is gone; one elsewhere when its file has not changed for `SILENCE` seconds of our own clock, as clocks of
machines differ and network file systems show a change up to a minute late.
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

from mama.run.digests import make_folder
from mama.runtime import preemption
from mama.runtime.errors import LaterError, StoppedError, TrainingError
from mama.settings.schema import ConfigError
from mama.train.heartbeat import BEAT, FOLDER
from shards.progress import repeated

log = logging.getLogger(__name__)

SILENCE = 120.0  # seconds without a sign from another machine, after which its process counts as dead
PATIENCE = 30.0  # seconds in which a living holder may end: it may be saving for the last time
IN_JOB = 900.0  # the same where an earlier start of our own Slurm job holds it, which Slurm will end
POLL = 0.5


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease. `started` and `machine` tell it from another one of its number."""

    host: str
    pid: int
    started: str  # clock ticks after the start of the machine
    machine: str  # boot and namespace of process numbers
    job: str  # of Slurm; empty outside of one

    @staticmethod
    def this() -> Holder:
        pid, job = os.getpid(), os.environ.get("SLURM_JOB_ID", "")
        return Holder(socket.gethostname(), pid, _started(pid) or "", _machine(), job)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (Slurm job {self.job})" if self.job else "")

    def is_gone(self) -> bool | None:
        """None where it cannot be seen from here."""
        return None if self.machine != _machine() else _started(self.pid) != self.started


@dataclass(frozen=True)
class Lease:
    """Lease `number` of a run folder, which this process holds."""

    run: Path
    number: int
    holder: Holder

    @property
    def path(self) -> Path:
        return _path(self.run, self.number)

    def check(self) -> None:
        """Raises `TrainingError` where another process has taken over: it took this one, stopped for long, for dead."""
        newest = _newest(self.run)
        if newest > self.number:
            holder = _read(_path(self.run, newest))[0] or "another process"
            raise TrainingError(
                f"{self.run}: {holder} has taken over, as this process gave no sign of life; it ends and writes nothing"
            )

    def beat(self) -> None:
        with suppress(OSError):
            os.utime(self.path)

    def release(self) -> None:
        with suppress(OSError):
            if _newest(self.run) == self.number:
                aside = _write_aside(self.run, self.holder, over=True)
                aside.replace(self.path)


@contextmanager
def held(run: Path) -> Iterator[Lease]:
    """Hold the lease of a run folder.

    Waits a while for a holder that may be ending. Raises `ConfigError` where it lives on, `LaterError` where
    that is an earlier start of the same Slurm job, and `StoppedError` where a signal came meanwhile.
    """
    lease = _take(run)
    try:
        with repeated(BEAT, lease.beat):
            yield lease
    finally:
        lease.release()


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
    """For the end of lease `number`."""

    def __init__(self, run: Path, number: int, me: Holder) -> None:
        self.run, self.number, self.me = run, number, me
        self.began = self.changed = time.monotonic()
        self.holder, self.sign = _read(_path(run, number))
        self.seen_alive = self.said = False

    def is_over(self) -> bool:
        holder, sign = _read(_path(self.run, self.number))
        if sign != self.sign:
            self.holder, self.sign, self.changed, self.seen_alive = holder, sign, time.monotonic(), True
        if holder is None and sign[0]:  # it says that nobody holds it
            return True
        gone = holder.is_gone() if holder else None
        if gone is False:
            self.seen_alive = True
        return time.monotonic() - self.changed > SILENCE if gone is None else gone

    def refuse(self) -> None:
        """Raise when there is no more hope, or a signal came."""
        in_job = self.holder is not None and self.holder.job != "" and self.holder.job == self.me.job
        who = self.holder or "an unknown process"
        if not self.said:
            self.said = True
            log.warning("%s is in use by %s; waiting for it to end", self.run, who)
        if preemption.told():
            raise StoppedError(f"a signal ended it while it waited for {who}; run it again to continue")
        waited = time.monotonic() - self.began
        if in_job and waited > IN_JOB:
            raise LaterError(f"{self.holder}, an earlier start of this job, still trains in {self.run}")
        if not in_job and self.seen_alive and waited > PATIENCE:
            raise ConfigError(
                f"name: {self.run} is being trained by {who}; wait for it, end it, or give another name=..."
            )


def _create(run: Path, number: int, me: Holder) -> Lease | None:
    """Lease `number`, unless somebody else was faster."""
    aside, path = _write_aside(run, me), _path(run, number)
    try:
        os.link(aside, path)
    except FileExistsError:
        if aside.stat().st_nlink != 2:  # else it is ours: NFS has repeated a request whose answer was lost
            return None
    except OSError:  # no hard links here
        try:
            with path.open("x") as file:
                file.write(aside.read_text())
        except FileExistsError:
            return None
    finally:
        aside.unlink()
    if _newest(run) != number:  # this process slept, and the numbers went on
        path.unlink(missing_ok=True)
        return None
    for old in (run / FOLDER).glob("lease-*.json"):
        if old != path:
            old.unlink(missing_ok=True)
    return Lease(run, number, me)


def _write_aside(run: Path, holder: Holder, over: bool = False) -> Path:
    aside = run / FOLDER / f".{uuid.uuid4().hex}"
    with aside.open("w") as file:
        json.dump({**asdict(holder), "over": over}, file)
        file.flush()
        os.fsync(file.fileno())
    return aside


def _newest(run: Path) -> int:
    """The highest number; 0 where there is none."""
    names = (name for name in os.listdir(run / FOLDER) if name.startswith("lease-") and name.endswith(".json"))
    return max((int(name[6:-5]) for name in names if name[6:-5].isdecimal()), default=0)


def _path(run: Path, number: int) -> Path:
    return run / FOLDER / f"lease-{number:06d}.json"


def _read(path: Path) -> tuple[Holder | None, tuple[str, int]]:
    """Who holds it, and its sign of life. Nobody, with a text, where it is over; nobody and no text: unreadable."""
    try:
        with path.open() as file:  # opened afresh, lest a network file system answer from memory
            text, changed = file.read(), os.fstat(file.fileno()).st_mtime_ns
        found: dict[str, Any] = json.loads(text)
        over = found.pop("over")
        return (None if over else Holder(**found)), (text, changed)
    except OSError:
        return None, ("", 0)
    except (AttributeError, KeyError, TypeError, ValueError):  # its machine lost power while it was written
        return None, ("", changed)


def _started(pid: int) -> str | None:
    """When a process started; None where there is none, or only what its parent has not asked for yet."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
