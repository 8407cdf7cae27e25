"""Batches: chains of Slurm arrays, one array a step, recorded before and after each is submitted.

A batch is submitted held, array by array, and released once all its arrays are recorded. So a submitter that is killed
leaves either a complete batch, which is released by the next one, or jobs that never start, which that one cancels.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from errno import EACCES, EAGAIN
from typing import Any

from mama.errors import ConfigError
from mama.run.files import read_object, write_json
from mama.sweep.sweep import Sweep
from shards.from_json import from_json

log = logging.getLogger(__name__)

SUBMITTING, COMPLETE, RELEASED, CANCELLED = "submitting", "complete", "released", "cancelled"


@dataclass(frozen=True)
class Batch:
    """Jobs of the same steps for several units: task i of each array works on `units[i]`."""

    id: str
    state: str  # SUBMITTING: not all of its arrays are recorded. COMPLETE: they are, and may still be held
    units: tuple[str, ...]  # points, or shards that points share
    steps: tuple[str, ...]
    jobs: dict[str, str] = field(default_factory=dict)  # step -> number of its array
    settings: dict[str, Any] = field(default_factory=dict)  # by point: its flat settings
    user: str = ""  # who submitted it; the queue that we see has no one else's jobs

    @property
    def comment(self) -> str:
        """The comment of its jobs, by which they are found even if their numbers were never recorded."""
        return f"mama {self.id}"

    def job(self, step: str, unit: str) -> str | None:
        """The job of a step of a unit, "123_4"; None if this batch has none."""
        if step not in self.jobs or unit not in self.units:
            return None
        return f"{self.jobs[step]}_{self.units.index(unit)}"


def read_batches(sweep: Sweep) -> list[Batch]:
    """The recorded batches, in the order in which they were submitted.

    Raises `ConfigError` for a damaged record: its jobs might be submitted twice.
    """
    batches = []
    for path in sorted((sweep.own / "batches").glob("*.json")):
        try:
            batches.append(from_json(Batch, read_object(path)))
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{path}: is damaged ({error}); cancel the jobs of the sweep (squeue --me), then delete this file"
            ) from None
    return batches


def write_batch(sweep: Sweep, batch: Batch) -> None:
    """Record a batch, atomically."""
    place = sweep.own / "batches"
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / f"{batch.id}.json", asdict(batch))


@contextmanager
def one_at_a_time(sweep: Sweep) -> Iterator[None]:
    """Only one process submits, or runs, the jobs of a sweep. Raises `ConfigError` if another does.

    On a file system without locks it only logs a warning.
    """
    sweep.own.mkdir(parents=True, exist_ok=True)
    with (sweep.own / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (EACCES, EAGAIN):
                log.warning(
                    "%s: this file system has no locks (%s): start one mama sweep at a time", sweep.own, error.strerror
                )
                yield
                return
            file.seek(0)
            who = file.read() or "another process"
            raise ConfigError(f"{sweep.folder}: {who} is at work on this sweep; wait for it to end") from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
