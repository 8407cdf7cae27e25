"""`mama jobs` and its commands, on jobs of submitit's real local executor and on points of a local sweep."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from submitit.core.core import Job

from mama.cli.main import cli
from mama.errors import ConfigError
from mama.jobs import actions, rows
from mama.jobs import table as jobs_table
from mama.jobs.run_jobs import run_states
from mama.sweep.saved import save_sweep
from mama.train.loop import train
from slurm.profile import Profile
from slurm.queue import QueuedJob
from slurm.submit import submit
from tests.support.checkout import CHECKOUT
from tests.support.jobs import wait_for
from tests.support.study import begun, study, submitted


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))  # jobs unpickle by the names of modules
    monkeypatch.setattr(Job, "_results_timeout_s", 0)
    return tmp_path


def mama(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, catch_exceptions=False)


def answer(text: str) -> int:
    print(text)
    return len(text)


def fail(text: str) -> None:
    print("about to fail")
    raise ConfigError(text)


def wait_for_a_signal(file: Path, *_: Any) -> None:
    """Write down which signal comes, as a training saves at SIGTERM."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: (file.write_text(signal.Signals(number).name), os._exit(75)))
    file.with_name("ready").touch()
    time.sleep(120)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run with two jobs that have ended, and their numbers."""
    run = tmp_path_factory.mktemp("template") / "mine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(CHECKOUT))
        calls = ((answer, "first"), (fail, "optim.lr: -1 is not positive"))
        jobs = [submit(function, word, profile=Profile(), folder=run) for function, word in calls]
        for job in jobs:
            wait_for(job.done)
    return run, [job.job_id for job in jobs]


@pytest.fixture
def ended(here: Path, template: tuple[Path, list[str]]) -> list[str]:
    """The same run, `mine`, in this folder."""
    shutil.copytree(template[0], here / "runs" / "mine")
    return template[1]


def test_the_jobs_of_a_run_are_listed_with_their_causes(ended: list[str]) -> None:
    text = mama("jobs", "runs/mine").output
    assert text.splitlines()[0] == "runs/mine: 1 point, 1 failed"
    assert "mine: job failed: optim.lr: -1 is not positive\n" in text
    assert ended[1] in text
    assert mama("jobs").output == mama("jobs", "mine").output == text


def test_a_job_is_what_its_result_says_and_nothing_is_unpickled(here: Path, ended: list[str]) -> None:
    (state,) = run_states(here / "runs" / "mine")[0]
    assert (state.step, state.state, state.job) == ("job", "failed", ended[1])
    (here / "runs" / "mine" / "jobs" / ended[1] / f"{ended[1]}_0_result.pkl").write_bytes(
        b"\x80\x04\x8c\x07success\x94cos\nsystem\n\x8c\x0ctouch hacked\x85R\x86."
    )
    (state,) = run_states(here / "runs" / "mine")[0]
    assert state.state == "done"
    assert not (here / "hacked").exists()


def test_logs_prints_the_ends_of_both_streams_apart(ended: list[str]) -> None:
    text = mama("jobs", "logs", "runs/mine").output
    heads = [line for line in text.splitlines() if line.startswith(("==", "--"))]
    place = f"runs/mine/jobs/{ended[1]}/{ended[1]}_0_log"
    assert heads == [
        f"== runs/mine: job failed, job {ended[1]}", f"-- stderr: {place}.err", f"-- stdout: {place}.out",
    ]  # fmt: skip
    errors, printed = text.partition("-- stderr")[2].split("-- stdout")
    assert "mama.errors.ConfigError: optim.lr: -1 is not positive" in errors
    assert "about to fail" in printed
    assert "about to fail" not in errors


def test_logs_prints_as_many_lines_as_asked_for(here: Path, ended: list[str]) -> None:
    log = here / "runs" / "mine" / "jobs" / ended[1] / f"{ended[1]}_0_log.err"
    log.write_text("".join(f"line {number}\n" for number in range(200)))
    default = mama("jobs", "logs", "runs/mine").output.partition("-- stdout")[0].splitlines()
    assert (len(default), default[2], default[-1]) == (52, "line 150", "line 199")
    fewer = mama("jobs", "logs", "runs/mine", "-n", "3").output.partition("-- stdout")[0].splitlines()
    assert fewer[2:] == ["line 197", "line 198", "line 199"]


def test_logs_shows_the_task_that_failed_first(here: Path, ended: list[str]) -> None:
    folder = here / "runs" / "mine" / "jobs" / ended[1]
    for task, text in enumerate(("Connection closed", "ValueError: of task one", "KeyboardInterrupt")):
        (folder / f"{ended[1]}_{task}_log.err").write_text(f"{text}\n")
    text = mama("jobs", "logs", "runs/mine").output
    assert re.findall(r"-- stderr: .*_(\d)_log.err", text) == ["0", "1"]


def test_logs_of_a_stage_of_a_point(here: Path) -> None:
    sweep = study(here, ["one", "two"])
    run = begun(sweep, "one", "train", "done").run_folder
    begun(sweep, "one", "consolidate", "failed", "no space")
    for step in ("train", "consolidate"):
        (run / "stages" / f"{step}.log").write_text(f"{step} says so\n")
    text = mama("jobs", "logs", "runs/study/one").output
    assert text == (
        "== runs/study/one: consolidate failed\n-- stdout and stderr: runs/study/one/stages/consolidate.log\n"
        "consolidate says so\n"
    )
    assert "train says so" in mama("jobs", "logs", "runs/study/one", "--stage", "train").output
    assert "no log yet (train missing, " in mama("jobs", "logs", "runs/study/two").output
    for arguments, message in (
        (
            ("runs/study/one", "--stage", "trian"),
            "--stage: 'trian' is not one of train, consolidate, eval-own, eval-train; did",
        ),
        (("runs/study/sweep",), "runs/study/sweep: is no point of the sweep; name its points, or the sweep for all"),
        (("runs/study/tow",), "no point of this name; did you mean two?"),
        (("runs",), "runs: is no point of a sweep, nor a run with jobs"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            mama("jobs", "logs", *arguments)


@pytest.mark.parametrize("words", ["shell", "runs/study", "runs/study/*", "runs/study/t[hw]*"])
def test_points_are_named_one_by_one_by_patterns_or_by_their_sweep(here: Path, words: str) -> None:
    """Also those that have no folder yet, which no shell finds; not what else lies in the sweep's folder."""
    sweep = study(here, ["one", "two", "three"])
    for name in ("one", "two"):
        begun(sweep, name, "train", "running")
    (here / "runs" / "study" / "report.html").touch()
    names = sorted(str(path) for path in Path("runs/study").glob("*")) if words == "shell" else [words]
    said = [line.partition(":")[0] for line in mama("jobs", "cancel", *names).output.splitlines()]
    expected = {"shell": ["one", "two"], "runs/study/t[hw]*": ["two", "three"]}.get(words, ["one", "two", "three"])
    assert said == [f"runs/study/{name}" for name in expected]


def test_the_jobs_of_a_point_that_was_taken_out_are_cancelled(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = study(here, ["stays", "goes"])
    job = submitted(sweep)["goes"]
    save_sweep(replace(sweep, points=sweep.points[:1]))
    waiting = QueuedJob(job, "PENDING", "Priority", "", "", "", 0)
    monkeypatch.setattr(rows, "queue", lambda: [waiting])
    gone: list[str] = []
    monkeypatch.setattr(actions, "cancel_jobs", gone.extend)
    assert mama("jobs", "cancel", "runs/study/goes").output == f"runs/study/goes: train (job {job}) was cancelled\n"
    assert gone == [job]
    monkeypatch.setattr(rows, "queue", list)
    assert mama("jobs", "cancel", "runs/study/goes").output == "runs/study/goes: nothing waits or runs\n"
    with pytest.raises(ConfigError, match="has no point of this name"):
        mama("jobs", "cancel", "runs/study/never")


def test_a_run_that_is_called_like_a_command_can_be_reached(here: Path, ended: list[str]) -> None:
    (here / "runs" / "mine").rename(here / "runs" / "logs")
    assert mama("jobs", "show", "logs").output.startswith("runs/logs: 1 point, 1 failed\n")
    assert mama("jobs", "runs/logs").output.startswith("runs/logs: 1 point, 1 failed\n")
    assert mama("jobs", "logs").exit_code == 2


def test_a_cancelled_training_is_asked_to_save_and_other_work_is_ended(here: Path) -> None:
    arguments: tuple[tuple[Any, ...], ...] = ((train,), ())  # the module that its pickle names tells what a job does
    for number, more in enumerate(arguments):
        run = here / "runs" / f"run{number}"
        run.mkdir(parents=True)
        job = submit(wait_for_a_signal, run / "signal", *more, profile=Profile(), folder=run)
        wait_for((run / "ready").exists)
        assert mama("jobs", f"runs/run{number}").output.splitlines()[0] == f"runs/run{number}: 1 point, 1 running"
        said = mama("jobs", "cancel", str(run)).output
        step, done = ("train", "was asked to save and stop") if more else ("job", "was ended")
        assert said == f"{run}: {step} (job {job.job_id}) {done}\n"
        job.wait()
        assert (run / "signal").read_text() == ("SIGTERM" if more else "SIGINT")
        assert mama("jobs", "cancel", str(run)).output == f"{run}: nothing waits or runs\n"
        assert "lost: its process is gone" in mama("jobs", str(run)).output


def test_a_point_that_runs_in_the_foreground_is_not_cancelled_from_elsewhere(here: Path) -> None:
    sweep = study(here, ["one"])
    begun(sweep, "one", "train", "running")
    assert mama("jobs", "cancel", "runs/study/one").output == (
        f"runs/study/one: train runs in the foreground on {os.uname().nodename}: press Ctrl-C there\n"
    )


def test_retry_is_for_points_of_a_sweep_on_a_cluster(here: Path, ended: list[str]) -> None:
    study(here, ["one"])
    with pytest.raises(ConfigError, match="runs/mine: is no point of a sweep; give the command"):
        mama("jobs", "retry", "runs/mine")
    with pytest.raises(ConfigError, match=r"this machine; mama sweep runs/study --retry goes on with it"):
        mama("jobs", "retry", "runs/study/one")


def test_watch_ends_at_ctrl_c_without_a_traceback(here: Path, ended: list[str]) -> None:
    command = [sys.executable, "-m", "mama", "jobs", "--watch", "runs/mine"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    shown = [process.stdout.readline() for _ in range(4)]
    assert shown[0] == "runs/mine: 1 point, 1 failed\n"
    assert shown[3] == "mine: job failed: optim.lr: -1 is not positive\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 0


def test_watch_looks_again(here: Path, ended: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter(range(3))

    def sleep(seconds: float) -> None:
        if next(looks) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(jobs_table.time, "sleep", sleep)
    assert mama("jobs", "runs/mine", "--watch").output.count("runs/mine: 1 point") == 3


@pytest.mark.parametrize("arguments", [("jobs", "--help"), ("jobs", "-h")])
def test_the_help_of_the_group_names_its_commands(arguments: tuple[str, ...]) -> None:
    text = mama(*arguments).output
    assert "[SWEEP | RUN | COMMAND ...]" in text
    assert re.findall(r"^  (\w+) ", text.partition("Commands:")[2], re.MULTILINE) == ["cancel", "logs", "retry", "show"]
    assert "--watch" in mama("jobs", "runs/x", "--help").output
