"""What a sweep would submit, without a Slurm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mama.errors import ConfigError
from mama.sweep.definition import load_sweep
from mama.sweep.submission import plan, submit_missing
from mama.sweep.sweep import Point, Sweep
from tests.support.study import begun, study


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
