"""Evaluations of one run that end together keep each other's tasks, in its results and in its model."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from contextlib import suppress
from errno import ENOLCK
from pathlib import Path
from typing import NoReturn

import pytest

from mama.evaluate import result_folders
from mama.export.consolidate import consolidate
from mama.export.figures import read_calibration, read_metrics
from tests.support.saved_run import small_run

# Evaluates one task. It begins and, having read the results that are there, lets the other process come as far.
PROGRAM = """
import sys, time
from pathlib import Path
from mama.cli.options import configured
from mama.evaluate import result_folders
from mama.evaluate.evaluation import evaluate

run, own, other = sys.argv[1:]

def meet(place, seconds):
    Path(f"{run}.{place}.{own}").touch()
    end = time.monotonic() + seconds
    while not Path(f"{run}.{place}.{other}").exists() and time.monotonic() < end:
        time.sleep(0.02)

def finish(*arguments):
    finished(*arguments)
    meet("finish", 4)

finished, result_folders.finish = result_folders.finish, finish
config = configured(run, (f"eval.tasks=[{own}]", "eval.bootstrap=0", "eval.heat_maps=0", "eval.protocols=[zeroshot]"))
meet("begin", 120)
evaluate(config, config.run_folder)
"""


def test_two_processes_keep_each_others_tasks(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    consolidate(config)
    run, tasks = config.run_folder, ["cancer", "density"]
    processes = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(run), *order], stderr=subprocess.PIPE, text=True)
        for order in (tasks, tasks[::-1])
    ]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    assert sorted(json.loads((run / "eval" / "complete.json").read_text())["tasks"]) == tasks
    metrics, calibration = read_metrics(run / "model"), read_calibration(run / "model")
    assert metrics
    assert calibration
    assert (sorted(metrics.tasks), sorted(calibration.tasks)) == (tasks, tasks)
    card = (run / "model" / "README.md").read_text()
    assert all(f"* `{task}`: " in card for task in tasks)


def test_without_locks_an_evaluation_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with result_folders.one_writer(tmp_path / "run"):
        assert "cannot be locked (No locks available)" in caplog.text


def test_an_error_releases_the_lock(tmp_path: Path) -> None:
    program = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'ab'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    taken = [sys.executable, "-c", program, str(tmp_path / result_folders.LOCK)]
    with suppress(RuntimeError), result_folders.one_writer(tmp_path):
        assert subprocess.run(taken, check=False, capture_output=True).returncode == 1
        raise RuntimeError
    subprocess.run(taken, check=True)
