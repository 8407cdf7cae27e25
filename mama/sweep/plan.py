"""What the points of a sweep lack: which steps are to be submitted, after which others, and what keeps them back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mama.run.checkpoint_marker import steps_taken
from mama.run.kept_settings import flat
from mama.settings.load import load_run
from mama.sweep.batches import Batch
from mama.sweep.state import Reader, StepState
from mama.sweep.sweep import SHARED, Point, Sweep
from mama.sweep.work import Work, require_settings, work_of

BROKEN = ("failed", "lost")  # states that only --retry submits again
IN_QUEUE = ("queued", "running")


@dataclass(frozen=True)
class Chain:
    """Units that lack the same steps, and wait for the same job: one array a step."""

    steps: tuple[str, ...]
    units: tuple[str, ...]
    works: dict[str, list[Work]]  # step -> the work of each unit
    shards: str | None = None  # name of the shards that they wait for, packed by a chain before this one
    after: str = ""  # job in the queue that they wait for, "123_4"
    configs: tuple[Point, ...] = ()  # the units, if they are points


@dataclass(frozen=True)
class Plan:
    """What a sweep lacks, and the states that say so."""

    chains: list[Chain]  # those of shards before those of points
    states: dict[str, list[StepState]]  # by point
    broken: dict[str, str]  # point -> step and cause, for points that only --retry submits again
    stale: list[str]  # jobs in the queue that wait for a step which will not come, and are submitted anew
    gone: list[str]  # points that were taken out of the sweep, and whose jobs are in the queue


@dataclass(frozen=True)
class Need:
    """What a line of steps needs."""

    steps: tuple[str, ...] = ()  # to be submitted
    stale: tuple[str, ...] = ()  # jobs in the queue that wait for a step which will not come
    broken: str = ""  # the step that only --retry submits again, and its cause


def plan(sweep: Sweep, retry: bool = False, names: Sequence[str] = ()) -> Plan:
    """Find out what each point lacks, of all or of those named. Raises `SlurmError` if Slurm does not answer."""
    reader = Reader(sweep)
    points = [point for point in sweep.points if not names or point.name in names]
    found = {point.name: reader.of_point(point) for point in points}
    require_same_settings(points, found, reader.batches)
    chains: dict[tuple[Any, ...], list[tuple[Point, list[Work]]]] = {}
    packing: dict[str, Chain] = {}
    broken: dict[str, str] = {}
    stale: list[str] = []
    for point in points:
        shards = [state for state in found[point.name] if state.step in SHARED]
        own = found[point.name][len(shards) :]
        need = _need(own, retry)
        packs = _need(shards, retry) if need.steps or not own else Need()
        if why := packs.broken or need.broken:
            broken[point.name] = why
        if packs.broken:
            continue
        stale += [job for job in (*packs.stale, *need.stale) if job not in stale]
        name = None
        if packs.steps:
            works = [work_of(sweep, point, step, in_job=True) for step in packs.steps]
            name = works[0].unit
            packing[name] = Chain(packs.steps, (name,), {work.step: [work] for work in works})
        if need.steps:
            waits = next((state.job for state in reversed(shards) if state.state in IN_QUEUE), None)
            key = (need.steps, name, "" if name else waits or "")
            works = [work_of(sweep, point, step, in_job=True) for step in need.steps]
            chains.setdefault(key, []).append((point, works))
    submitted = [*packing.values(), *(_chain(key, units) for key, units in chains.items())]
    return Plan(submitted, found, broken, stale, reader.taken_out())


def _need(line: list[StepState], retry: bool) -> Need:
    """What a line of steps needs: all from the first that is not done, but evaluations do not wait for each other."""
    first = next((n for n, s in enumerate(line) if s.state != "done" and not s.step.startswith("eval")), None)
    if first is None:
        evaluations = [s for s in line if s.state != "done" and s.state not in IN_QUEUE]
        bad = next((s for s in evaluations if s.state in BROKEN), None)
        steps = tuple(s.step for s in evaluations if retry or s.state not in BROKEN)
        return Need(steps, broken=f"{bad.step} failed: {bad.reason}" if bad and not retry else "")
    begin, rest = line[first], line[first + 1 :]
    if begin.state in IN_QUEUE:
        return Need()
    if begin.state in BROKEN and not retry:
        return Need(broken=f"{begin.step} failed: {begin.reason}")
    # Slurm lets them wait until the whole array of the step before has ended, even if their own task is gone.
    stale = tuple(s.job for s in rest if s.state in IN_QUEUE and s.job)
    return Need((begin.step, *(s.step for s in rest)), stale)


def _chain(key: tuple[Any, ...], units: list[tuple[Point, list[Work]]]) -> Chain:
    steps, shards, after = key
    works = {step: [works[i] for _, works in units] for i, step in enumerate(steps)}
    points = tuple(point for point, _ in units)
    return Chain(steps, tuple(point.name for point in points), works, shards, after, points)


def require_same_settings(points: Sequence[Point], found: dict[str, list[StepState]], recorded: list[Batch]) -> None:
    """Refuse points that were begun, or are in the queue, with other settings."""
    for point in points:
        now = _plain(flat(asdict(point.config)))
        run = point.config.run_folder
        if (run / "config.yaml").exists() and (steps_taken(run) or (run / "model").exists()):
            require_settings(_plain(flat(asdict(load_run(run)))), now, point.name)
        elif any(state.state in IN_QUEUE for state in found[point.name] if state.step not in SHARED):
            newest = next((b.settings[point.name] for b in reversed(recorded) if point.name in b.settings), None)
            if newest is not None:
                require_settings(newest, now, point.name)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they come back from JSON."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
