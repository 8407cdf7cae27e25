"""Submit what a sweep lacks, as chains of Slurm arrays: nothing twice, nothing forgotten, whenever it is killed."""

from __future__ import annotations

import getpass
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from mama.errors import ConfigError
from mama.run.environment import copy_code
from mama.run.kept_settings import flat
from mama.sweep import batches
from mama.sweep.batches import Batch, one_at_a_time, read_batches, write_batch
from mama.sweep.plan import Chain, Plan, plan
from mama.sweep.resources import profile_of
from mama.sweep.saved import save_sweep
from mama.sweep.sweep import SHARED, Sweep
from mama.sweep.work import run_step
from slurm.profile import SlurmError
from slurm.queue import Limits, cancel, limits, never_starts, queue, release, waits_for_ever
from slurm.snapshot import code_digest
from slurm.submit import Request, submit_calls


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
            code = sweep.own / "code" / code_digest()
            after = _dependency(chain, step, {}, {})
            yield title, _request(sweep, step, after, "BATCH", code).script(len(chain.units))


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
            calls = [(run_step, (work,)) for work in chain.works[step]]
            after = _dependency(chain, step, batch.jobs, packed)
            jobs = submit_calls(calls, _request(sweep, step, after, batch.comment, code))
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


def _request(sweep: Sweep, step: str, dependency: str, comment: str, code: Path) -> Request:
    """What Slurm is asked for with the array of a step."""
    return Request(
        profile=profile_of(sweep, step),
        folder=sweep.own,
        name=f"{sweep.name}-{step}",
        comment=comment,
        dependency=dependency,
        at_once=sweep.at_once,
        hold=True,
        code=code,
    )


def _dependency(chain: Chain, step: str, jobs: dict[str, str], packed: dict[str, str]) -> str:
    """What the array of a step waits for: task by task for the step before it, else for the shards."""
    line = [earlier for earlier in chain.steps[: chain.steps.index(step)] if not earlier.startswith("eval")]
    if line:
        return f"aftercorr:{jobs.get(line[-1], line[-1].upper())}"
    if chain.shards:
        return f"afterok:{packed.get(chain.shards, 'CHECK')}"
    return f"afterok:{chain.after}" if chain.after else ""


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
