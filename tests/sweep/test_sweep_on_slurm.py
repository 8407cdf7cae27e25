"""A sweep to its end on a real Slurm, and the same one on this machine."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mama.export.model_folder import read_model, weights_digest
from mama.run.environment import commit
from mama.sweep import status
from mama.sweep.batches import read_batches
from mama.sweep.local import LocalRun
from mama.sweep.state import states
from mama.sweep.submission import submit_missing
from mama.sweep.sweep import Point, Sweep
from mama.sweep.work import work_of
from slurm.snapshot import code_digest
from tests.support import jobs
from tests.support.checkout import CHECKOUT
from tests.support.cohort import write_shards
from tests.support.tiny_run import config_of

if TYPE_CHECKING:
    from tests.support.slurm_cluster import Cluster

pytestmark = pytest.mark.ranks
pytest_plugins = ("tests.support.slurm_cluster",)
wait_for = partial(jobs.wait_for, seconds=600)

CRASHES, PREEMPTED = "seed-4", "seed-5"


def study(folder: Path, name: str, profile: str, seeds: range) -> Sweep:
    """One point a seed; that of seed 4 reads shards that are not there."""
    place = folder / "runs" / name
    points = []
    for seed in seeds:
        config = config_of(folder, f"seed-{seed}", steps=24 if seed == 5 else 4)
        train = replace(config.train, ranks=1, validate_every=0, zero_stage=2)
        data = replace(config.data, shards=[str(folder / ("shards4" if seed == 4 else "shards"))], workers=0)
        points.append(Point(replace(config, runs=str(place), seed=seed, train=train, data=data), {"seed": seed}))
    return Sweep(name, place, points, ["train", "consolidate"], [], {"default": profile}, at_once=2)


def words(sweep: Sweep) -> dict[str, list[str]]:
    return {point: [state.state for state in line] for point, line in states(sweep).items()}


def weights(sweep: Sweep, point: str) -> tuple[int, str]:
    """The step and the digest of the weights of a consolidated point."""
    folder = sweep.folder / point / "model"
    return read_model(folder).step, weights_digest(folder)


def requeue(cluster: Cluster, number: str) -> None:
    cluster.run("scancel", "--signal=USR2", number)
    state = ("squeue", "--noheader", "--array", "--format=%T", f"--jobs={number}")
    wait_for(lambda: cluster.run(*state) == "PENDING\n")
    cluster.run("scontrol", "update", f"JobId={number}", "StartTime=now+2")  # else it waits for two minutes


def steps_logged(run: Path) -> list[int]:
    log = run / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [line["step"] for line in lines if "loss/total" in line]


def test_a_sweep_with_a_point_that_crashes_and_one_that_is_preempted(
    slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "shards", {"train": 10, "val": 4, "test": 6})
    (tmp_path / "cpu.yaml").write_text("cluster: slurm\npartition: cpu\ntimeout_min: 30\n")
    sweep = study(tmp_path, "study", str(tmp_path / "cpu.yaml"), range(3, 6))
    code = code_digest()
    submit_missing(sweep)
    (batch,) = read_batches(sweep)
    wait_for(lambda: len(steps_logged(sweep.folder / PREEMPTED)) >= 2)
    requeue(slurm_cluster, f"{batch.jobs['train']}_2")
    wait_for(lambda: not slurm_cluster.jobs())

    found = states(sweep)
    good = [point.name for point in sweep.points if point.name != CRASHES]
    assert {tuple(state.state for state in found[name]) for name in good} == {("done", "done")}
    assert [state.state for state in found[CRASHES]] == ["failed", "missing"], "nothing consolidates what did not train"
    assert "shards4" in found[CRASHES][0].reason
    assert found[PREEMPTED][0].starts == 2
    assert steps_logged(sweep.folder / PREEMPTED) == list(range(24))
    assert json.loads((sweep.folder / "seed-3" / "point.json").read_text()) == {
        "sweep": "study",
        "differs": {"seed": 3},
    }

    environment = json.loads((sweep.folder / "seed-3" / "environment.json").read_text())
    assert environment["code"] == code
    assert (sweep.own / "code" / code / "mama").is_dir()
    assert environment["commit"] == commit(CHECKOUT)

    (why,) = submit_missing(sweep)
    assert why.startswith(f"{CRASHES}: train failed: ")
    assert slurm_cluster.jobs() == []
    shutil.copytree(tmp_path / "shards", tmp_path / "shards4")
    submit_missing(sweep, retry=True)
    wait_for(lambda: not slurm_cluster.jobs())
    assert set(map(tuple, words(sweep).values())) == {("done", "done")}
    assert submit_missing(sweep, retry=True) == []

    here = study(tmp_path, "here", "local", range(4, 6))
    assert set(LocalRun(here, False, print).run().values()) == {"done"}
    for point in (CRASHES, PREEMPTED):
        assert weights(here, point) == weights(sweep, point)


def test_work_of_shared_shards_is_the_same_for_all_points(tmp_path: Path) -> None:
    sweep = replace(study(tmp_path, "study", "local", range(2)), stages=["pack", "train"])
    first, second = (work_of(sweep, point, "pack") for point in sweep.points)
    assert first.status == second.status
    assert first.settings == second.settings
    assert status.read(first.status) is None
