"""`mama jobs logs|cancel|retry POINT...`: read the logs of a point's newest job, end its jobs, submit it again."""

from __future__ import annotations

import fnmatch
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from mama.errors import ConfigError
from mama.jobs.causes import cause_of
from mama.jobs.rows import point_of, states_of
from mama.jobs.run_jobs import RunJob, read_logs
from mama.run.files import named
from mama.sweep.definition import load_sweep
from mama.sweep.progress import last_lines
from mama.sweep.resources import cluster_of
from mama.sweep.saved import holds_sweep
from mama.sweep.state import StepState
from mama.sweep.submission import submit_missing
from mama.sweep.sweep import OWN, SHARED, Sweep
from shards.errors import did_you_mean
from slurm.profile import SlurmError
from slurm.queue import cancel as cancel_jobs
from slurm.queue import stop

LOG_BYTES = 2**20  # of a log that is read for its last lines


def folders(words: Sequence[Path]) -> list[Path]:
    """The run folders that words name: points, whole sweeps, runs, and patterns of names, as in `runs/lr/*`.

    Points that wait have no folder yet, so a shell may not find them, but what else lies in a sweep's folder: that is
    passed over. A point that was taken out of the sweep can be named. Raises `ConfigError` if nothing is named.
    """
    found: list[Path] = []
    for run in map(named, words):
        sweep = load_sweep(run) if holds_sweep(run) else load_sweep(run.parent) if holds_sweep(run.parent) else None
        if sweep is None:
            found.append(run)
            continue
        names = [point.name for point in sweep.points]
        chosen = names if holds_sweep(run) else fnmatch.filter(names, run.name)
        if not chosen and run.name != OWN and not run.is_file() and not set(run.name) & set("*?["):
            chosen = [run.name]
        found += [sweep.folder / name for name in chosen]
    if not found:
        raise ConfigError(f"{words[0]}: is no point of the sweep; name its points, or the sweep for all of them")
    return list(dict.fromkeys(found))


def logs(run: Path, lines: int, stage: str | None) -> Iterator[str]:
    """The last lines of the newest log of a point or a run, or of one stage: stderr, then stdout.

    Of the first task, and of the one that failed first. Raises `ConfigError` for another folder, or an unknown stage.
    """
    steps, _ = states_of(run)
    names = list(dict.fromkeys(step.step for step in steps))
    if stage is not None and stage not in names:
        raise ConfigError(f"--stage: {stage!r} is not one of {', '.join(names)}{did_you_mean(stage, names)}")
    written = [step for step in steps if stage in (None, step.step) and step.log and step.log.exists()]
    if not written:
        yield f"== {run}: no log yet ({', '.join(f'{step.step} {step.state}' for step in steps)})"
        return
    newest = max(written, key=lambda step: step.log.stat().st_mtime if step.log else 0.0)
    assert newest.log is not None
    yield f"== {run}: {newest.step} {newest.state}" + (f", job {newest.job}" if newest.job else "")
    failed = re.search(r"\brank (\d+)", cause_of(read_logs(newest.log)))
    for task in dict.fromkeys((0, int(failed[1]) if failed else 0)):
        error = newest.log.with_name(newest.log.name.replace("_0_log", f"_{task}_log"))
        for kind, path in (("stderr", error), ("stdout", error.with_suffix(".out"))):
            if path.exists():
                yield f"-- {kind if error.suffix == '.err' else 'stdout and stderr'}: {path}"
                yield from last_lines(path, LOG_BYTES)[-lines:]


def cancel(run: Path) -> Iterator[str]:
    """Cancel what a point, or a run, has in the queue, and ask what runs to stop; yields what was done.

    A training saves at the end of its step, however long that takes; other steps are ended. Raises `ConfigError` for
    another folder, `SlurmError` if Slurm does not answer.
    """
    steps, problem = states_of(run)
    if problem:
        raise SlurmError(problem)
    done = False
    for word in ("queued", "running"):  # in this order, so that nothing starts meanwhile
        for step in steps:
            if step.state == word:
                done = True
                yield f"{run}: {step.step}" + (f" (job {step.job}) " if step.job else " ") + _end(step, run)
    if not done:
        yield f"{run}: nothing waits or runs"


def retry(runs: Sequence[Path]) -> Iterator[str]:
    """Submit what points lack again, also what failed; yields what was done.

    Raises `ConfigError` if one is no point of a sweep whose jobs run on a cluster.
    """
    by_sweep: dict[Path, tuple[Sweep, list[str]]] = {}
    for run in runs:
        found = point_of(run)
        if found is None:
            raise ConfigError(f"{run}: is no point of a sweep; give the command that submitted it again")
        sweep, point = found
        if cluster_of(sweep) == "local":
            raise ConfigError(
                f"{run}: its sweep runs on this machine; mama sweep {sweep.folder} --retry goes on with it"
            )
        by_sweep.setdefault(sweep.folder, (sweep, []))[1].append(point.name)
    for sweep, names in by_sweep.values():
        yield from submit_missing(sweep, retry=True, points=names) or ["nothing to submit: all is done or in the queue"]


def _end(step: StepState, run: Path) -> str:
    """End a step that waits or runs; returns what was done."""
    if step.step in SHARED and point_of(run):
        return "is shared with other points, and goes on"
    if step.job is None:
        return f"runs in the foreground on {step.node}: press Ctrl-C there"
    saves = step.step == "train" and step.state == "running"
    if step.log and RunJob(step.log.parent).is_local:
        with suppress(ProcessLookupError):  # submitit's process passes SIGTERM on, and ends the tasks at SIGINT
            os.kill(int(step.job), signal.SIGTERM if saves else signal.SIGINT)
        return "was asked to save and stop" if saves else "was ended"
    if saves:
        stop([step.job])
        return f"was asked to save and stop; scancel {step.job} ends it at once"
    cancel_jobs([step.job])
    return "was cancelled"
