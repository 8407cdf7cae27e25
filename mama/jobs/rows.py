"""What the points of sweeps, and the jobs of runs, are doing: found on the disk and in Slurm's queue."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mama.errors import ConfigError
from mama.jobs.causes import cause_of
from mama.jobs.run_jobs import UNKNOWN, read_logs, run_jobs, run_states
from mama.run.files import named
from mama.settings.load import load_run
from mama.settings.schema import Config
from mama.sweep import status
from mama.sweep.batches import read_batches
from mama.sweep.definition import load_sweep
from mama.sweep.progress import Progress, read_progress, standstill
from mama.sweep.saved import holds_sweep
from mama.sweep.state import StepState, log_of, states
from mama.sweep.sweep import OWN, Point, Sweep
from mama.sweep.work import work_of
from shards.errors import did_you_mean
from slurm.profile import SlurmError
from slurm.queue import never_starts, queue

BROKEN = ("failed", "lost", "stopped", UNKNOWN)
# Slurm's reasons (squeue(1)) for which a job waits in the ordinary way -> in plain words.
WAITS = {
    "BeginTime": "waits for its time to begin; a requeued job waits for about two minutes",
    "Dependency": "waits for the step before",
    "JobArrayTaskLimit": "waits for others; at_once of them run",
    "JobHeldAdmin": "held by an administrator",
    "JobHeldUser": "held; scontrol release lets it start",
    "Priority": "waits its turn",
    "Resources": "waits for free nodes",
}


@dataclass(frozen=True)
class Row:
    """A step of a point, or a job of a run."""

    point: str
    state: StepState
    why: str = ""  # it failed, waits, or stands still
    progress: Progress | None = None  # of a training that has begun, or of the one before this step


@dataclass(frozen=True)
class Listing:
    """What there is to show of a sweep or a run."""

    name: str
    rows: list[Row]
    problem: str = ""  # why something could not be found out


def listings(word: str | None, runs: Path = Path("runs")) -> list[Listing]:
    """The sweep or the run that `word` names, or all below `runs` that have jobs.

    A word is a folder, the name of one in `runs`, a sweep's file, or the name of a shipped one. Raises `ConfigError`.
    """
    if word is not None:
        return [_listing(word, runs)]
    folders = [path for path in sorted(runs.glob("*")) if holds_sweep(path) or _has_jobs(path)]
    if not folders:
        raise ConfigError(f"{runs}: no sweep and no run in this folder has jobs; name one: mama jobs PATH")
    return [_listing_or_problem(folder) for folder in folders]


def point_of(run: Path) -> tuple[Sweep, Point] | None:
    """The point whose run folder this is, or will be, and its sweep; None if it lies in no sweep.

    Raises `ConfigError` if the sweep has no such point.
    """
    if not holds_sweep(run.parent) or run.name == OWN:
        return None
    sweep = load_sweep(run.parent)
    names = [point.name for point in sweep.points]
    if run.name not in names:
        raise ConfigError(f"{run}: the sweep has no point of this name{did_you_mean(run.name, names)}")
    return sweep, sweep.points[names.index(run.name)]


def states_of(run: Path) -> tuple[list[StepState], str]:
    """The steps of a point, or the jobs of a run; and why something could not be found out, or "".

    Of a point that was taken out of its sweep: its jobs in the queue. Raises `ConfigError` if the folder is neither,
    `SlurmError` if Slurm does not answer for a point that was taken out.
    """
    if jobs := _jobs_taken_out(run):
        queued = {each.id: each for each in queue()}
        own = [(step, queued[job]) for step, job in jobs if job in queued]
        words = {"PENDING": "queued"}
        return [StepState(step, words.get(q.state, "running"), q.id, q.reason, q.node or None) for step, q in own], ""
    if found := point_of(run):
        sweep, point = found
        by_point, problem = _sweep_states(sweep, [point])
        return by_point[point.name], problem
    if not _has_jobs(run):
        raise ConfigError(f"{run}: is no point of a sweep, nor a run with jobs")
    return run_states(run)


def _jobs_taken_out(run: Path) -> list[tuple[str, str]]:
    """(step, job) of all jobs of a point that its sweep does not have any more; empty for anything else."""
    if not holds_sweep(run.parent) or run.name == OWN:
        return []
    sweep = load_sweep(run.parent)
    if run.name in [point.name for point in sweep.points]:
        return []
    return [(step, job) for batch in read_batches(sweep) for step in batch.jobs if (job := batch.job(step, run.name))]


def _listing_or_problem(folder: Path) -> Listing:
    """The listing of one of several folders: a damaged one does not hide the others."""
    try:
        return _listing(str(folder), folder.parent)
    except ConfigError as error:
        return Listing(str(folder), [], str(error))


def _listing(word: str, runs: Path) -> Listing:
    for folder in (named(Path(word)), runs / word):
        if holds_sweep(folder):
            return _of_sweep(load_sweep(folder))
        if holds_sweep(folder.parent) or _has_jobs(folder):
            return _of_run(folder)
        if (folder / "config.yaml").is_file():
            raise ConfigError(f"{folder}: has no jobs; a command with --slurm submits one")
    return _of_sweep(load_sweep(word))


def _of_sweep(sweep: Sweep) -> Listing:
    by_point, problem = _sweep_states(sweep, sweep.points)
    rows = [row for point in sweep.points for row in _rows(point.name, _present(by_point[point.name]), point.config)]
    return Listing(str(sweep.folder), rows, problem)


def _of_run(run: Path) -> Listing:
    found, problem = states_of(run)
    config = replace(load_run(run), name=run.name, runs=str(run.parent)) if (run / "config.yaml").exists() else None
    return Listing(str(run), list(_rows(run.name, found, config)), problem)


def _sweep_states(sweep: Sweep, points: Sequence[Point]) -> tuple[dict[str, list[StepState]], str]:
    """The states of the points; if Slurm does not answer, what the disk says, and why."""
    try:
        return states(sweep, points), ""
    except SlurmError as error:
        return {point.name: list(_on_disk(sweep, point)) for point in points}, f"{error}; this is what the disk says"


def _on_disk(sweep: Sweep, point: Point) -> Iterator[StepState]:
    """The steps of a point as their status files have them; one that may be in the queue is unknown."""
    batches = read_batches(sweep)
    for step in sweep.steps():
        work = work_of(sweep, point, step)
        jobs = [job for batch in batches if (job := batch.job(step, work.unit))]
        job = jobs[-1] if jobs else None
        found = status.read(work.status)
        if found is None:
            yield StepState(step, UNKNOWN if job else "missing", job, log=log_of(sweep, job, work))
        else:
            word = UNKNOWN if found.state == "running" and found.job else found.state
            log = log_of(sweep, found.job, work)
            yield StepState(step, word, found.job, found.cause or "", found.node, found.starts, log)


def _present(steps: list[StepState]) -> list[StepState]:
    """What a point does now: the steps that run or broke, else the next one, else the last."""
    return (
        [step for step in steps if step.state in (*BROKEN, "running")]
        or [step for step in steps if step.state != "done"][:1]
        or steps[-1:]
    )


def _rows(name: str, steps: list[StepState], config: Config | None) -> Iterator[Row]:
    progress = read_progress(config) if config else None
    for state in steps:
        began = progress if progress and (progress.taken or state.step == "train") else None
        yield Row(name, state, _why(state, config, began), began)


def _why(state: StepState, config: Config | None, progress: Progress | None) -> str:
    """Why a step waits, stands still or failed, in one line."""
    if state.state == "queued":
        return never_starts(state.reason) or WAITS.get(state.reason, state.reason)
    if state.state == "running":
        return standstill(config, progress) if config and progress and state.step == "train" else ""
    if state.state not in ("failed", "lost", UNKNOWN):
        return state.reason
    # The status file of a job may know only of a rank that another one took down. A job may also end before it writes
    # one. A log of this machine holds earlier failures too.
    logs = read_logs(state.log) if state.log and (state.job or not state.reason) else {0: state.reason}
    return cause_of(logs) or state.reason


def _has_jobs(folder: Path) -> bool:
    return bool(run_jobs(folder))
