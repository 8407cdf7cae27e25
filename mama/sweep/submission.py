"""Submit what a sweep lacks, as chains of Slurm arrays: nothing twice, nothing forgotten, whenever it is killed."""

from __future__ import annotations

import getpass
import logging
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mama.errors import ConfigError
from mama.run.checkpoint_marker import steps_taken
from mama.run.environment import copy_code
from mama.run.kept_settings import flat
from mama.settings.load import load_profile, load_run
from mama.sweep import batches
from mama.sweep.batches import Batch, one_at_a_time, read_batches, write_batch
from mama.sweep.saved import save_sweep
from mama.sweep.state import Reader, StepState
from mama.sweep.sweep import SHARED, Point, Sweep
from mama.sweep.work import Work, require_settings, run_step, work_of
from slurm.profile import Profile, SlurmError
from slurm.queue import Limits, cancel, limits, never_starts, queue, release, waits_for_ever
from slurm.snapshot import code_digest
from slurm.submit import script_of, submit_calls

log = logging.getLogger(__name__)

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


def submit_missing(sweep: Sweep, retry: bool = False, points: Sequence[str] = ()) -> list[str]:
    """Submit every step that a point lacks, of all points or of those named; returns lines that say what was done.

    Raises `ConfigError` if another process submits this sweep, or if the settings of a point that was begun have
    changed; `SlurmError` if Slurm refuses. What was submitted until then is recorded, and runs.
    """
    with one_at_a_time(sweep):
        recover(sweep)
        planned = plan(sweep, retry, points)
        save_sweep(sweep)  # only now: a change that is refused must not reach the file that names the points
        cancel(planned.stale)
        code = copy_code(sweep.own / "code")
        lines: list[str] = []
        packed: dict[str, str] = {}
        submitted: list[Batch] = []
        for chain, left_out in _cut(planned.chains, _limits(sweep), len(queue()) if planned.chains else 0):
            if left_out:
                lines.append(f"{left_out} left out: the cluster takes no more jobs of yours now; run this again later")
                continue
            batch = _submit(sweep, chain, packed, code)
            if chain.steps[-1] in SHARED:
                packed[chain.units[0]] = f"{batch.jobs[chain.steps[-1]]}_0"
            numbers = ", ".join(f"{step} {batch.jobs[step]}" for step in batch.steps)
            lines.append(f"submitted {_count(len(chain.units), 'job')} in each array: {numbers}")
            submitted.append(batch)
        lines += [line for batch in submitted if (line := _never(batch))]
        lines += _stuck(sweep, planned)
        lines += [
            f"{name}: is no point any more, but has jobs in the queue: mama jobs cancel {sweep.folder / name}"
            for name in planned.gone
        ]
        return lines + [f"{name}: {why}; --retry submits it again" for name, why in planned.broken.items()]


def recover(sweep: Sweep) -> None:
    """Complete or undo what a killed submitter left: release complete batches, cancel the jobs of others.

    Also of batches that were undone before: their `sbatch` may have been on its way. Raises `ConfigError` if someone
    else has submitted jobs of this sweep.
    """
    all_batches = read_batches(sweep)
    if other := next((batch for batch in all_batches if batch.user not in ("", getpass.getuser())), None):
        raise ConfigError(
            f"{sweep.folder}: {other.user} has submitted jobs of this sweep, which you cannot see and would submit "
            "twice; give the sweep another name=..."
        )
    jobs = queue() if all_batches else []
    for batch in all_batches:
        mine = [job.id for job in jobs if job.comment == batch.comment]
        if batch.state == batches.COMPLETE:
            release(list(batch.jobs.values()))
            write_batch(sweep, replace(batch, state=batches.RELEASED))
        elif batch.state != batches.RELEASED:
            cancel(mine)
            if batch.state != batches.CANCELLED:
                write_batch(sweep, replace(batch, state=batches.CANCELLED))


def scripts(sweep: Sweep, planned: Plan) -> Iterator[tuple[str, str]]:
    """(title, batch script) of every array that would be submitted."""
    for chain in planned.chains:
        for step in chain.steps:
            title = f"{step}: {', '.join(chain.units)}"
            options = _options(sweep, chain, step, "BATCH", {}, {})
            code = sweep.own.absolute() / "code" / code_digest()
            yield title, script_of(_calls(chain, step), **options, hold=True, code=code)


def gpu_hours(sweep: Sweep, planned: Plan) -> float | None:
    """GPUs x time limits of all jobs that would be submitted, in hours: the most that they take without a requeue.

    None if a profile asks for GPUs in another way than by `gpus_per_node`.
    """
    total = 0.0
    for chain in planned.chains:
        for step in chain.steps:
            profile = profile_of(sweep, step)
            if any("gpu" in f"{option} {value}".lower() for option, value in profile.additional.items()):
                return None
            total += len(chain.units) * (profile.nodes or 1) * (profile.gpus_per_node or 0) * profile.timeout_min / 60
    return total


def cluster_of(sweep: Sweep) -> str:
    """Where the jobs of the sweep run: "local" or "slurm". Raises `ConfigError` if its profiles do not agree."""
    where = {step: profile_of(sweep, step).cluster for step in sweep.steps()}
    if len(set(where.values())) > 1:
        listed = ", ".join(f"{step}: {cluster}" for step, cluster in where.items())
        raise ConfigError(f"profiles: {listed}; all stages run on one cluster, or all on this machine")
    return next(iter(where.values()))


def require_ranks(sweep: Sweep) -> None:
    """Raise `ConfigError` if the ranks that a point will have cannot share its batches: fail now, not in the job."""
    if "train" not in sweep.stages:
        return
    profile = profile_of(sweep, "train")
    for point in sweep.points:
        ranks = point.config.train.ranks if profile.tasks == 1 or profile.cluster == "local" else profile.tasks
        try:
            point.config.train.accumulation(ranks)
        except ConfigError as error:
            raise ConfigError(f"{point.name}: {error}") from error


def local_plan(sweep: Sweep) -> dict[str, list[str]]:
    """The steps that each point lacks, by its name."""
    reader = Reader(sweep)
    return {p.name: [s.step for s in reader.of_point(p) if s.state != "done"] for p in sweep.points}


def profile_of(sweep: Sweep, step: str) -> Profile:
    """The profile of a step: its own, that of all evaluations for one of them, else the default."""
    names = sweep.profiles
    stage = "eval" if step.startswith("eval") else step
    return load_profile(names.get(step) or names.get(stage) or names.get("default") or "local")


def _chain(key: tuple[Any, ...], units: list[tuple[Point, list[Work]]]) -> Chain:
    steps, shards, after = key
    works = {step: [works[i] for _, works in units] for i, step in enumerate(steps)}
    points = tuple(point for point, _ in units)
    return Chain(steps, tuple(point.name for point in points), works, shards, after, points)


def _limits(sweep: Sweep) -> Limits:
    """The smallest limits among those of the accounts and qos of the sweep's profiles."""
    profiles = [profile_of(sweep, step) for step in sweep.steps()]
    found = [limits(*each) for each in dict.fromkeys((profile.account, profile.qos) for profile in profiles)]
    jobs = [each.jobs for each in found if each.jobs is not None]
    return Limits(min(each.array_size for each in found), min(jobs, default=None))


def _cut(chains: list[Chain], bounds: Limits, waiting: int) -> Iterator[tuple[Chain, int]]:
    """The chains, cut to arrays that the cluster accepts; at last how many units it does not take now."""
    left = None if bounds.jobs is None else max(0, bounds.jobs - waiting)
    left_out = 0
    to_pack = {chain.units[0] for chain in chains if chain.steps[-1] in SHARED}
    for chain in chains:
        size = len(chain.units)
        if chain.shards in to_pack:  # what they wait for was left out itself
            left_out += size
            continue
        largest = min(size, bounds.array_size or size)
        first = 0
        while first < size:
            count = min(largest, size - first)
            if left is not None:
                count = min(count, left // len(chain.steps))
                left -= count * len(chain.steps)
            if count == 0:
                left_out += size - first
                break
            to_pack -= {chain.units[0]}
            yield _part(chain, slice(first, first + count)), 0
            first += count
    if left_out:
        yield chains[-1], left_out


def _part(chain: Chain, part: slice) -> Chain:
    works = {step: works[part] for step, works in chain.works.items()}
    return replace(chain, units=chain.units[part], works=works, configs=chain.configs[part])


def _submit(sweep: Sweep, chain: Chain, packed: dict[str, str], code: Path) -> Batch:
    """Submit the arrays of a chain, held, and release them once all are recorded."""
    settings = {point.name: flat(asdict(point.config)) for point in chain.configs}
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}-{secrets.token_hex(3)}"
    batch = Batch(name, batches.SUBMITTING, chain.units, chain.steps, {}, settings, getpass.getuser())
    write_batch(sweep, batch)
    try:
        for step in chain.steps:
            options = _options(sweep, chain, step, batch.comment, batch.jobs, packed)
            jobs = submit_calls(_calls(chain, step), **options, hold=True, code=code)
            batch = replace(batch, jobs={**batch.jobs, step: jobs[0].job_id.partition("_")[0]})
            write_batch(sweep, batch)
    except SlurmError:
        cancel(list(batch.jobs.values()))
        write_batch(sweep, replace(batch, state=batches.CANCELLED))
        raise
    batch = replace(batch, state=batches.COMPLETE)
    write_batch(sweep, batch)
    release(list(batch.jobs.values()))
    write_batch(sweep, replace(batch, state=batches.RELEASED))
    return batch


def _stuck(sweep: Sweep, planned: Plan) -> list[str]:
    """A line for each step whose jobs were in the queue before, and will wait for ever."""
    waiting = [state for line in planned.states.values() for state in line if state.state == "queued"]
    stuck = Counter((state.step, why) for state in waiting if (why := never_starts(state.reason)))
    fix = f"change the profile, mama jobs cancel {sweep.folder}, then run this again"
    return [
        f"{_count(number, 'job')} of {step} will wait for ever: {why}; {fix}" for (step, why), number in stuck.items()
    ]


def _never(batch: Batch) -> str:
    """Why the first array of a batch will wait for ever, or "". It stays in the queue: a node may come back."""
    number = batch.jobs[batch.steps[0]]
    if why := waits_for_ever(number):
        return f"array {number} will wait for ever: {why}; change the profile, cancel it (mama jobs cancel), try again"
    return ""


def _calls(chain: Chain, step: str) -> list[tuple[Any, tuple[Work]]]:
    return [(run_step, (work,)) for work in chain.works[step]]


def _options(
    sweep: Sweep, chain: Chain, step: str, comment: str, jobs: dict[str, str], packed: dict[str, str]
) -> dict[str, Any]:
    """The options of `submit_calls` for the array of a step."""
    return {
        "profile": profile_of(sweep, step),
        "folder": sweep.own,
        "name": f"{sweep.name}-{step}",
        "comment": comment,
        "dependency": _dependency(chain, step, jobs, packed),
        "at_once": sweep.at_once,
    }


def _dependency(chain: Chain, step: str, jobs: dict[str, str], packed: dict[str, str]) -> str:
    """What the array of a step waits for: task by task for the step before it, else for the shards."""
    line = [earlier for earlier in chain.steps[: chain.steps.index(step)] if not earlier.startswith("eval")]
    if line:
        return f"aftercorr:{jobs.get(line[-1], line[-1].upper())}"
    if chain.shards:
        return f"afterok:{packed.get(chain.shards, 'CHECK')}"
    return f"afterok:{chain.after}" if chain.after else ""


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


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
