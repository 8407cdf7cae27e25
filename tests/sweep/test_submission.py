"""Submit a sweep to a real Slurm: every job once, whatever happens to the submitter."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mama.errors import ConfigError
from mama.sweep import batches, submission
from mama.sweep.batches import one_at_a_time, read_batches
from mama.sweep.definition import load_sweep
from mama.sweep.state import states
from mama.sweep.submission import submit_missing
from mama.sweep.sweep import Evaluation, Point, Sweep
from mama.sweep.work import shards_name
from slurm import queue as slurm_queue
from slurm.queue import Limits
from tests.support.jobs import wait_for
from tests.support.slurm_cluster import LARGEST_ARRAY
from tests.support.tiny_run import config_of

if TYPE_CHECKING:
    from tests.support.slurm_cluster import Cluster

pytestmark = pytest.mark.ranks
pytest_plugins = ("tests.support.slurm_cluster",)

PROFILE = "cluster: slurm\npartition: cpu\ntimeout_min: 30\n"
KILLED = 137


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """Four points of three stages; two of them also pack shards of their own."""
    (tmp_path / "cpu.yaml").write_text(PROFILE)
    folder = tmp_path / "runs" / "study"
    points = [point(tmp_path, folder, seed) for seed in range(4)]
    evaluations = [Evaluation("eval-own"), Evaluation("eval-train", {"eval.split": "train"})]
    stages = ["train", "consolidate", "eval"]
    return Sweep("study", folder, points, stages, evaluations, {"default": str(tmp_path / "cpu.yaml")}, at_once=3)


def point(tmp_path: Path, folder: Path, seed: int) -> Point:
    config = config_of(tmp_path, f"seed-{seed}")
    pack = replace(config.pack, source="phantom", root=str(tmp_path / "dicom"), out=str(tmp_path / f"shards{seed % 2}"))
    return Point(replace(config, runs=str(folder), seed=seed, pack=pack), {"seed": seed})


def in_queue(cluster: Cluster, sweep: Sweep) -> Counter[tuple[str, str]]:
    """(step, unit) -> how many jobs of it wait in the queue and may start: by their comments, not by our numbers."""
    units = {batch.comment: batch for batch in read_batches(sweep)}
    found: Counter[tuple[str, str]] = Counter()
    for job in slurm_queue.queue():
        assert "Held" not in job.reason, job
        step = job.name.removeprefix(f"{sweep.name}-")
        found[step, units[job.comment].units[int(job.id.partition("_")[2])]] += 1
    return found


def all_once(sweep: Sweep) -> Counter[tuple[str, str]]:
    own = [step for step in sweep.steps() if step not in ("pack", "check")]
    return Counter({(step, point.name): 1 for step in own for point in sweep.points})


def run_and_die(after: int, sweep: Sweep) -> bool:
    """Submit in a process that kills itself after its change number `after`; returns whether it got there."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == KILLED
    count = 0

    def tick() -> None:
        nonlocal count
        if count == after:
            os._exit(KILLED)
        count += 1

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            result = function(*args, **named)
            tick()
            return result

        return call

    for name in ("submit_calls", "release", "write_batch", "save_sweep", "copy_code"):
        setattr(submission, name, deadly(getattr(submission, name)))
    try:
        submit_missing(sweep)
    finally:
        os._exit(0)


def test_each_step_of_each_point_is_submitted_once(closed: Cluster, sweep: Sweep) -> None:
    submit_missing(sweep)
    assert in_queue(closed, sweep) == all_once(sweep)
    before = slurm_queue.queue()
    assert submit_missing(sweep) == []
    assert slurm_queue.queue() == before
    (batch,) = read_batches(sweep)
    described = {step: closed.run("scontrol", "show", "job", f"{number}_0") for step, number in batch.jobs.items()}
    assert "ArrayTaskThrottle=3" in described["train"]
    assert f"aftercorr:{batch.jobs['train']}_*" in described["consolidate"]
    for step in ("eval-own", "eval-train"):
        assert f"aftercorr:{batch.jobs['consolidate']}_*" in described[step]
    found = states(sweep)
    assert {(state.step, state.state) for line in found.values() for state in line} == {
        (step, "queued") for step in sweep.steps()
    }
    assert found["seed-2"][0].job == f"{batch.jobs['train']}_2"


def test_points_with_the_same_shards_wait_for_one_job_that_packs_them(closed: Cluster, sweep: Sweep) -> None:
    sweep = replace(sweep, stages=["pack", "check", *sweep.stages])
    submit_missing(sweep)
    found = in_queue(closed, sweep)
    assert sum(found.values()) == 2 * 2 + 4 * 4
    assert set(found.values()) == {1}
    packing = {batch.units[0].rpartition("-")[0]: batch for batch in read_batches(sweep) if "pack" in batch.jobs}
    assert sorted(packing) == ["shards0", "shards1"]
    for batch in read_batches(sweep):
        if "train" in batch.jobs:
            (shards,) = {f"shards{int(name[-1]) % 2}" for name in batch.units}
            described = closed.run("scontrol", "show", "job", f"{batch.jobs['train']}_0")
            assert f"afterok:{packing[shards].jobs['check']}_0" in described


def test_a_submitter_killed_at_any_moment_submits_nothing_twice_and_forgets_nothing(
    closed: Cluster, sweep: Sweep
) -> None:
    sweep = replace(sweep, points=sweep.points[::2], stages=["pack", "check", "train"], evaluations=[])
    shards = shards_name(sweep.points[0].config.pack)
    expected = sorted([(("pack", shards), 1), (("check", shards), 1), *all_once(sweep).items()])
    moment = 0
    while run_and_die(moment, sweep):
        submit_missing(sweep)
        found = in_queue(closed, sweep)
        assert sorted(found.items()) == expected, f"killed after change {moment}"
        closed.run("scancel", "--partition=cpu")
        shutil.rmtree(sweep.folder)
        moment += 1
    assert moment == 16, "every change was met"


def test_jobs_of_an_interrupted_submission_that_were_never_recorded_are_cancelled(
    closed: Cluster, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch may go on after its caller was killed, and the job appear when the next submitter has looked."""
    calls = submission.submit_calls

    def late(*args: Any, **named: Any) -> Any:
        calls(*args, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(submission, "submit_calls", late)
    with pytest.raises(KeyboardInterrupt):
        submit_missing(sweep)
    monkeypatch.setattr(submission, "submit_calls", calls)
    with monkeypatch.context() as context:
        context.setattr(submission, "cancel", lambda ids: None)  # the job is not in the queue yet
        submit_missing(sweep)
    submit_missing(sweep)
    assert in_queue(closed, sweep) == all_once(sweep)


def test_two_submitters_at_once(closed: Cluster, sweep: Sweep) -> None:
    with one_at_a_time(sweep), pytest.raises(ConfigError, match=r"pid \d+ on .* is at work on this sweep"):
        submit_missing(sweep)
    assert slurm_queue.queue() == []
    other = replace(sweep, name="other", folder=sweep.folder.with_name("other"))
    submit_missing(sweep)
    submit_missing(other)
    assert len(slurm_queue.queue()) == 2 * 16


def test_arrays_are_cut_at_what_the_cluster_accepts(closed: Cluster, sweep: Sweep, tmp_path: Path) -> None:
    points = [point(tmp_path, sweep.folder, seed) for seed in range(LARGEST_ARRAY + 2)]
    sweep = replace(sweep, points=points, stages=["train"], evaluations=[])
    submit_missing(sweep)
    assert [len(batch.units) for batch in read_batches(sweep)] == [LARGEST_ARRAY, 2]
    assert in_queue(closed, sweep) == all_once(sweep)


def test_arrays_are_cut_at_other_limits(closed: Cluster, sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "limits", lambda *_: Limits(array_size=3, jobs=None))
    submit_missing(sweep)
    assert [len(batch.units) for batch in read_batches(sweep)] == [3, 1]
    assert in_queue(closed, sweep) == all_once(sweep)
    closed.run("scancel", "--partition=cpu")
    monkeypatch.setattr(submission, "limits", lambda *_: Limits(array_size=3, jobs=9))
    assert submit_missing(sweep)[-1].startswith("2 left out: ")
    assert sum(in_queue(closed, sweep).values()) == 8
    assert submit_missing(sweep)[-1].startswith("2 left out: ")
    monkeypatch.setattr(submission, "limits", lambda *_: Limits(array_size=3, jobs=16))
    submit_missing(sweep)
    assert in_queue(closed, sweep) == all_once(sweep)


def test_points_may_come_and_go_but_their_settings_stay(closed: Cluster, sweep: Sweep) -> None:
    submit_missing(replace(sweep, points=sweep.points[:2]))
    said = submit_missing(replace(sweep, points=sweep.points[1:]))
    place = sweep.folder / "seed-0"
    assert said[-1] == f"seed-0: is no point any more, but has jobs in the queue: mama jobs cancel {place}"
    assert in_queue(closed, sweep) == all_once(sweep)
    changed = sweep.points[1].config
    changed = replace(changed, train=replace(changed.train, steps=99))
    with pytest.raises(ConfigError, match=r"seed-1: train\.steps: 99, but the point was begun with 8; give"):
        submit_missing(replace(sweep, points=[sweep.points[0], Point(changed, {"seed": 1})]))
    assert len(load_sweep(sweep.folder).points) == 3, "what is refused changes nothing"


def test_what_waits_for_a_cancelled_job_is_submitted_anew_with_it(closed: Cluster, sweep: Sweep) -> None:
    """Slurm lets a task wait for that of the step before, though it is gone, until the whole array has ended."""
    submit_missing(sweep)
    (first,) = read_batches(sweep)
    closed.run("scancel", f"{first.jobs['train']}_2")
    assert states(sweep)["seed-2"][0].state == "missing"
    assert len(submit_missing(sweep)) == 1
    assert in_queue(closed, sweep) == all_once(sweep)
    assert submit_missing(sweep) == []
    closed.run("scancel", f"{first.jobs['eval-own']}_1")
    submit_missing(sweep)
    assert submit_missing(sweep) == []


def test_a_refusal_of_slurm_leaves_nothing_behind(closed: Cluster, sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(PROFILE.replace("partition: cpu", "partition: gpus"))
    bad = replace(sweep, profiles={**sweep.profiles, "consolidate": str(tmp_path / "bad.yaml")})
    with pytest.raises(slurm_queue.SlurmError, match="Invalid partition name") as caught:
        submit_missing(bad)
    assert "\n" not in str(caught.value)
    assert slurm_queue.queue() == []
    assert [batch.state for batch in read_batches(sweep)] == [batches.CANCELLED]
    submit_missing(sweep)
    assert in_queue(closed, sweep) == all_once(sweep)


def test_a_job_that_ends_before_its_work_begins_has_failed_and_is_not_submitted_for_ever(
    slurm_cluster: Cluster, sweep: Sweep, tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text(PROFILE + "setup: [exit 3]\n")
    one = replace(sweep, points=sweep.points[:1], profiles={"default": str(tmp_path / "bad.yaml")})
    submit_missing(one)
    wait_for(lambda: not slurm_cluster.jobs(), 180)
    found = states(one)["seed-0"]
    assert [state.state for state in found] == ["failed", "missing", "missing", "missing"]
    assert submit_missing(one) == [f"seed-0: train failed: {found[0].reason}; --retry submits it again"]
    assert slurm_cluster.jobs() == []
