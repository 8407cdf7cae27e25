"""What a sweep would submit, without a Slurm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mama.errors import ConfigError
from mama.sweep import state, submission
from mama.sweep.batches import read_batches, write_batch
from mama.sweep.definition import load_sweep
from mama.sweep.plan import Chain, plan
from mama.sweep.submission import submit_missing
from mama.sweep.sweep import Point, Sweep
from slurm.queue import EndedJob, Limits
from tests.support.study import begun, study, submitted


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return study(tmp_path, ["seed-0", "seed-1"])


def changed(sweep: Sweep, number: int, **settings: Any) -> Sweep:
    """The sweep with another `loss` of one point."""
    points = list(sweep.points)
    config = points[number].config
    points[number] = Point(replace(config, loss=replace(config.loss, **settings)), points[number].differs)
    return replace(sweep, points=points)


def test_a_change_that_is_refused_does_not_reach_the_saved_sweep(sweep: Sweep) -> None:
    begun(sweep, "seed-1", "train", "done")
    with pytest.raises(ConfigError, match=r"seed-1: loss\.view: 0\.25, but the point was begun with "):
        submit_missing(changed(sweep, 1, view=0.25))
    assert load_sweep(sweep.folder).points == sweep.points


def test_a_point_whose_checkpoints_were_deleted_is_not_trained_anew_with_other_settings(sweep: Sweep) -> None:
    run = begun(sweep, "seed-1", "train", "done").run_folder
    begun(sweep, "seed-1", "consolidate", "done")
    for folder in (run / "checkpoints").iterdir():
        folder.rename(run / f"gone-{folder.name}")
    assert plan(sweep).states["seed-1"][0].state == "done"
    with pytest.raises(ConfigError, match=r"seed-1: loss\.view: 0\.25, but the point was begun with "):
        plan(changed(sweep, 1, view=0.25))


def test_a_retry_of_one_point_knows_the_axes_of_all(sweep: Sweep) -> None:
    """They are written to its point.json, from which TensorBoard has its columns."""
    other = Point(sweep.points[1].config, {**sweep.points[1].differs, "optim.lr": sweep.points[1].config.optim.lr})
    planned = plan(replace(sweep, points=[sweep.points[0], other]), names=["seed-0"])
    assert list(planned.states) == ["seed-0"]
    (work,) = planned.chains[0].works["train"]
    assert work.differs.keys() == {"seed", "optim.lr"}


def test_points_whose_packing_is_left_out_are_left_out_too() -> None:
    packing = Chain(("pack", "check"), ("archive-1",), {"pack": [], "check": []})
    waiting = Chain(("train",), ("seed-0",), {"train": []}, shards="archive-1")
    ready = Chain(("train",), ("seed-1",), {"train": []})

    def parts(jobs: int | None) -> list[tuple[tuple[str, ...], int]]:
        bounds = Limits(array_size=9, jobs=jobs)
        return [(part.units, left) for part, left in submission._cut([packing, waiting, ready], bounds, 0)]

    assert parts(None) == parts(4) == [(("archive-1",), 0), (("seed-0",), 0), (("seed-1",), 0)]
    assert parts(1) == [(("seed-1",), 0), (("seed-1",), 2)]


def test_the_limits_are_those_of_the_accounts_that_the_profiles_name(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, more in (("gpu", "account: ours\nqos: long\n"), ("cpu", "")):
        (tmp_path / f"{name}.yaml").write_text(f"cluster: slurm\n{more}")
    monkeypatch.setattr(submission, "limits", lambda account, qos: Limits(100, 7 if account else None))
    profiles = {"train": str(tmp_path / "gpu.yaml"), "default": str(tmp_path / "cpu.yaml")}
    assert submission._limits(replace(sweep, profiles=profiles)) == Limits(100, 7)
    assert submission._limits(replace(sweep, profiles={"default": profiles["default"]})) == Limits(100, None)


def test_a_job_taken_away_before_its_work_began_is_submitted_again(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submitted(sweep)["seed-0"]
    log = sweep.own / "jobs" / job / f"{job}_0_log.err"
    log.parent.mkdir(parents=True)
    log.touch()
    monkeypatch.setattr(state, "queue", list)
    monkeypatch.setattr(state, "ended", lambda ids: {})
    found = state.states(sweep)["seed-0"][0]
    assert (found.state, found.reason) == ("failed", "it ended before its work began; see its log")
    monkeypatch.setattr(state, "ended", lambda ids: {each: EndedJob(each, "NODE_FAIL", "n1", 0, 0) for each in ids})
    found = state.states(sweep)["seed-0"][0]
    assert (found.state, found.reason) == ("stopped", "node failure")


def test_the_log_is_that_of_the_job_that_left_the_word(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted(sweep, "78")  # cancelled before it began
    begun(sweep, "seed-0", "train", "failed", "no disk", job="77_0")
    monkeypatch.setattr(state, "queue", list)
    found = state.states(sweep)["seed-0"][0]
    assert (found.job, found.log) == ("77_0", sweep.own / "jobs" / "77_0" / "77_0_0_log.err")


def test_a_sweep_that_someone_else_has_submitted_is_refused(sweep: Sweep) -> None:
    """Their jobs are not among those that `squeue --me` shows."""
    submitted(sweep)
    (batch,) = read_batches(sweep)
    write_batch(sweep, replace(batch, user="anna"))
    with pytest.raises(ConfigError, match="anna has submitted jobs of this sweep"):
        submit_missing(sweep)
