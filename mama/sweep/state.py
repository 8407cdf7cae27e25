"""The state of every step of every point: what lies on disk, and what Slurm says. Nothing else is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mama.sweep import status
from mama.sweep.batches import read_batches
from mama.sweep.sweep import SHARED, Point, Sweep
from mama.sweep.work import Work, work_of
from slurm.queue import TAKEN_AWAY, QueuedJob, ended, queue


@dataclass(frozen=True)
class StepState:
    """The state of a step of a point.

    missing: never begun, or its result is gone. queued, running: its job is in the queue. stopped: saved by a signal,
    or taken away by the cluster, and not in the queue. lost: it had begun, is not in the queue, and left no word.
    """

    step: str
    state: str  # missing, queued, running, done, failed, stopped, lost
    job: str | None = None  # "123_4"; None on the local machine
    reason: str = ""  # why it waits, or why it ended, in one line
    node: str | None = None
    starts: int = 0
    log: Path | None = None  # stderr of its first task


class Reader:
    """Reads states with one look at the queue and at the recorded batches.

    Raises `SlurmError` if there are recorded batches and Slurm does not answer: what runs is then unknown.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.batches = read_batches(sweep)
        # The queue first: a job that ends between both looks has then left its word in its status file.
        self.queued: dict[str, QueuedJob] = {job.id: job for job in queue()} if self.batches else {}
        self.shared: dict[Path, StepState] = {}  # by status file: many points have the same shards, and hash a manifest

    def of_point(self, point: Point) -> list[StepState]:
        """The states of the steps of a point, in their order."""
        return [self._once(work_of(self.sweep, point, step)) for step in self.sweep.steps()]

    def _once(self, work: Work) -> StepState:
        if work.step not in SHARED:
            return self.of(work)
        if work.status not in self.shared:
            self.shared[work.status] = self.of(work)
        return self.shared[work.status]

    def taken_out(self) -> list[str]:
        """The points that the sweep no longer has, and that have jobs in the queue."""
        named = {point.name for point in self.sweep.points}
        begun = [(batch, unit) for batch in self.batches for unit in batch.settings if unit not in named]
        waits = {unit for b, unit in begun if any(b.job(step, unit) in self.queued for step in b.steps)}
        return sorted(waits)

    def of(self, work: Work) -> StepState:
        """The state of one step."""
        job, waiting = self._newest_job(work)
        found = status.read(work.status)
        log = log_of(self.sweep, job, work)
        if waiting:
            state = "queued" if waiting.state == "PENDING" else "running"
            reason = waiting.reason if state == "queued" else ""
            starts = found.starts if found and found.job == waiting.id else 0
            return StepState(work.step, state, waiting.id, reason, waiting.node or None, starts, log)
        if job and log and log.exists() and (found is None or found.job not in (None, job)):
            end = ended([job]).get(job)
            if end and end.state in TAKEN_AWAY:
                return StepState(work.step, "stopped", job, TAKEN_AWAY[end.state], log=log)
            return StepState(work.step, "failed", job, "it ended before its work began; see its log", log=log)
        if found is None:
            return StepState(work.step, "missing", job, log=log)
        word, reason = self._last_word(work, found)
        # A newer job may have been cancelled before it began.
        log = log_of(self.sweep, found.job, work)
        return StepState(work.step, word, found.job, reason, found.node, found.starts, log)

    def _last_word(self, work: Work, found: status.Status) -> tuple[str, str]:
        """The state that a status file means, now that no job of the step is in the queue, and the reason."""
        if found.state == "done":
            return ("done", "") if work.is_done() else ("missing", "")
        if found.state != "running":
            return found.state, found.cause or ""
        if found.job is None:
            return ("running", "") if status.is_alive(found) else ("lost", "its process is gone")
        end = ended([found.job]).get(found.job)
        if end is None:
            return "lost", "it left the queue, and there is no accounting to say why"
        if end.state in TAKEN_AWAY:
            return "stopped", TAKEN_AWAY[end.state]
        return "failed", f"Slurm: {end.state}, exit code {end.exit_code}"

    def _newest_job(self, work: Work) -> tuple[str | None, QueuedJob | None]:
        """The newest job that was submitted for a step, and its entry in the queue, or that of an older one."""
        jobs = [job for batch in self.batches if (job := batch.job(work.step, work.unit))]
        waiting = next((self.queued[job] for job in reversed(jobs) if job in self.queued), None)
        return (jobs[-1] if jobs else None), waiting


def states(sweep: Sweep, points: Sequence[Point] | None = None) -> dict[str, list[StepState]]:
    """The states of the steps of each point (all by default), by its name. Raises `SlurmError` as `Reader` does."""
    reader = Reader(sweep)
    return {point.name: reader.of_point(point) for point in (sweep.points if points is None else points)}


def log_of(sweep: Sweep, job: str | None, work: Work) -> Path | None:
    """The stderr of the first task of a job of this work; without a job that of this machine, if there is one."""
    if job is not None:
        return sweep.own / "jobs" / job / f"{job}_0_log.err"
    local = work.status.with_suffix(".log")
    return local if local.exists() else None
