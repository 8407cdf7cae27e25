"""A sweep on this machine: each step in a process of its own; what fails, stops or is at work elsewhere."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from errno import ENOSYS
from pathlib import Path
from typing import NoReturn

import pytest

from mama.errors import ConfigError
from mama.settings.schema import Config
from mama.sweep import status
from mama.sweep.batches import one_at_a_time
from mama.sweep.dry_run import exit_code
from mama.sweep.local import STOPPED, LocalRun
from mama.sweep.saved import save_sweep
from mama.sweep.state import states
from mama.sweep.sweep import Point, Sweep
from mama.sweep.work import work_of
from shards.pack.settings import PackConfig
from tests.support.checkout import CHECKOUT


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """Three points whose shards are packed and checked: two share theirs, those of the third cannot be packed."""
    folder = tmp_path / "runs" / "study"
    points = []
    for seed, name in enumerate(("a", "a", "b")):
        root = str(tmp_path / "dicom") if name == "a" else str(tmp_path / "missing")
        source = "phantom" if name == "a" else "embed"
        options = {"patients": 4} if name == "a" else {}
        pack = PackConfig(
            source=source, root=root, out=str(tmp_path / name), options=options, long_side=64, workers=1,
            key_file=str(tmp_path / "hash.key"),
        )  # fmt: skip
        points.append(Point(Config(name=f"seed-{seed}", runs=str(folder), seed=seed, pack=pack), {"seed": seed}))
    return Sweep("study", folder, points, ["pack", "check"], [], at_once=2)


def test_points_share_steps_and_one_that_fails_stops_no_other(sweep: Sweep) -> None:
    said: list[str] = []
    outcome = LocalRun(sweep, False, said.append).run()
    assert (outcome["seed-0"], outcome["seed-1"]) == ("done", "done")
    assert outcome["seed-2"].startswith("pack failed: ")
    assert exit_code(outcome) == 1
    assert len([line for line in said if "pack started" in line]) == 2, "two points have the same shards"
    assert [[s.state for s in line] for line in states(sweep).values()] == [["done"] * 2] * 2 + [["failed", "missing"]]

    said.clear()
    again = LocalRun(sweep, False, said.append).run()
    assert said == []
    assert again["seed-2"].endswith("--retry runs it again")
    LocalRun(sweep, True, said.append).run()
    assert [line for line in said if "started" in line] == [said[0]]
    assert said[0].endswith("pack started")

    shutil.rmtree(sweep.points[0].config.pack.out)
    assert states(sweep)["seed-0"][0].state == "missing", "what was done is gone"


def test_exit_codes() -> None:
    assert exit_code({"a": "done"}) == 0
    assert exit_code({"a": "done", "b": STOPPED}) == 75
    assert exit_code({"a": f"train {STOPPED}", "b": "train failed: x"}) == 1
    assert exit_code({"a": "train failed: rank 1 stopped answering; --retry runs it again"}) == 1


def test_work_of_another_process_is_no_failure() -> None:
    assert exit_code({"a": "done", "b": "train is at work elsewhere (job 7_0)"}) == 75


def test_a_second_run_of_a_sweep_is_refused(sweep: Sweep) -> None:
    with one_at_a_time(sweep), pytest.raises(ConfigError, match=rf"pid {os.getpid()} on .* is at work on this sweep"):
        LocalRun(sweep, False, print).run()


def test_a_file_system_without_locks_is_only_warned_of(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with one_at_a_time(sweep):
        assert "has no locks (Function not implemented)" in caplog.text


def test_packages_that_modules_of_the_cluster_provide_are_found_in_the_steps(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`module load` sets PYTHONPATH."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("print('from the module')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    one = replace(sweep, points=sweep.points[:1], stages=["pack"])
    assert set(LocalRun(one, False, print).run().values()) == {"done"}
    assert "from the module" in work_of(one, one.points[0], "pack").status.with_suffix(".log").read_text()


def test_another_process_with_the_number_of_one_that_is_gone(sweep: Sweep) -> None:
    work = work_of(sweep, sweep.points[0], "pack")
    found = status.start(work.status, work.settings, None)
    assert status.is_alive(found)
    before = (datetime.now(UTC) - timedelta(days=1)).isoformat(timespec="seconds")
    assert not status.is_alive(replace(found, since=before))


def test_a_step_that_a_killed_sweep_left_running_is_waited_for(sweep: Sweep) -> None:
    one = replace(sweep, points=sweep.points[:1])
    work = work_of(one, one.points[0], "pack")
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        found = status.start(work.status, work.settings, None)
        status.end(work.status, replace(found, pid=sleeper.pid), "running")
        assert states(one)["seed-0"][0].state == "running"
        threading.Timer(2, sleeper.kill).start()
        threading.Thread(target=sleeper.wait, daemon=True).start()  # else it would stay as a zombie
        said: list[str] = []
        assert set(LocalRun(one, True, said.append).run().values()) == {"done"}
        assert "waiting for it" in said[0]
    finally:
        sleeper.kill()


def test_ctrl_c_stops_every_step_and_the_same_command_goes_on(sweep: Sweep, tmp_path: Path) -> None:
    """In a process of its own, as from a terminal: the step that runs ends as stopped, and no other begins."""
    packs = replace(sweep.points[0].config.pack, options={"patients": 400}, long_side=512)
    large = Point(replace(sweep.points[0].config, pack=packs), {"seed": 0})
    one = replace(sweep, points=[large])
    save_sweep(one)
    command = [sys.executable, "-m", "mama", "sweep", str(one.folder)]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    work = work_of(one, large, "pack")
    deadline = time.monotonic() + 180
    while status.read(work.status) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 75, output
    assert "pack stopped" in output
    assert [state.state for state in states(one)["seed-0"]] == ["stopped", "missing"]
