"""`mama jobs` on run folders that the real writers made; of Slurm only its commands are faked."""

from __future__ import annotations

import io
import json
import os
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from mama.errors import ConfigError
from mama.jobs import table as jobs_table
from mama.jobs.rows import Listing, listings
from mama.sweep.progress import duration, read_progress, standstill
from mama.sweep.sweep import Sweep
from tests.support.study import STEPS, begun, logged, study, submitted

LONG = "recipe-mama_published_code_seed-3_optim.lr-0.00005_data.fraction-0.01"
NAMES = ("fresh", "waits", "trains", "stands", "broke", "stopped", "done", LONG)
ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds the only commands there are."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def answers(folder: Path, command: str, text: str, code: int = 0) -> None:
    """Let a command of Slurm print a text and end with a code."""
    (folder / command).write_text(f"#!/bin/sh\nprintf '%s' '{text}'\nexit {code}\n")
    (folder / command).chmod(0o755)


def squeue(*jobs: tuple[str, str, str, str]) -> str:
    """What squeue prints of jobs (id, state, reason, node)."""
    return "".join(
        f"{id}\x1f{state}\x1f{reason}\x1f{node}\x1fname\x1fcomment\x1f0\x1f\n" for id, state, reason, node in jobs
    )


def shown(found: list[Listing], width: int | None = None) -> str:
    """The page in a pipe, or on a terminal of this width."""
    file = io.StringIO()
    console = Console(file=file, highlight=False, width=width, force_terminal=width is not None, _environ={})
    if width is None:
        return "\n".join(jobs_table.plain_lines(found, console))
    jobs_table.show(found, console)
    return file.getvalue()


def row(text: str, name: str) -> list[str]:
    """The words of the first line that begins with this name."""
    return next(line.split() for line in text.splitlines() if line.startswith(f"{name} "))


def aged(run: Path, seconds: float) -> None:
    """Let a training that runs have begun, and logged its last step, so long ago."""
    for name in ("log.jsonl", "stages/train.json"):
        os.utime(run / name, (time.time() - seconds,) * 2)


@pytest.fixture
def sweep(here: Path) -> Sweep:
    """A local sweep with a point in each state."""
    sweep = study(here, NAMES)
    logged(begun(sweep, "trains", "train", "running"), range(0, 251, 10), rate=16.0, loss=1.2345678)
    stands = begun(sweep, "stands", "train", "running")
    logged(stands, range(0, 101, 10), rate=16.0)
    aged(stands.run_folder, 720)
    logged(begun(sweep, "broke", "train", "failed", "optim.lr: -1 is not positive"), range(0, 31, 10), rate=16.0)
    begun(sweep, "stopped", "train", "stopped", "a signal ended it after 31 of 1000 steps; run it again to continue")
    for name in ("done", LONG):
        for step in sweep.steps():
            config = begun(sweep, name, step, "done")
        logged(config, range(0, STEPS, 10), rate=16.0)
    return sweep


def test_each_point_has_a_row_with_its_stage_state_and_progress(sweep: Sweep) -> None:
    text = shown(listings("runs/study"))
    assert text.splitlines()[0] == "runs/study: 8 points, 2 done, 2 missing, 2 running, 1 stopped, 1 failed"
    assert text.splitlines()[1].split() == list(jobs_table.COLUMNS)
    assert row(text, "fresh") == ["fresh", "train", "missing", "0/1000"]
    node = os.uname().nodename
    assert row(text, "trains") == ["trains", "train", "running", "251/1000", "1.235", "16", "6", "min", node]
    assert row(text, "broke") == ["broke", "train", "failed", "31/1000", "2", node]
    assert row(text, LONG) == [LONG, "eval-train", "done", "991/1000", "2", node]


def test_below_the_table_stands_why_a_point_failed_or_stands_still(sweep: Sweep) -> None:
    text = shown(listings("runs/study"))
    assert "broke: train failed: optim.lr: -1 is not positive\n" in text
    assert "stopped: train stopped: a signal ended it after 31 of 1000 steps; run it again to continue\n" in text
    assert re.search(r"^stands: train running: no step for 12 min$", text, re.MULTILINE)
    assert "trains: " not in text


def test_a_file_gets_whole_names_and_no_colours(sweep: Sweep) -> None:
    text = shown(listings("runs/study"))
    assert not ANSI.search(text)
    assert "…" not in text
    assert LONG in text
    assert all(line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize("width", [80, 100])
def test_a_narrow_terminal_folds_and_cuts_nothing_off(sweep: Sweep, width: int) -> None:
    coloured = shown(listings("runs/study"), width)
    text = ANSI.sub("", coloured)
    assert ANSI.search(coloured)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for words in ("251/1000", "6 min", os.uname().nodename, "optim.lr: -1 is not positive"):
        assert words in " ".join(text.split())
    first = [line.split(" ")[0] for line in text.splitlines()]
    assert LONG in "".join(first)


def test_a_wide_terminal_has_a_line_for_each_point(sweep: Sweep) -> None:
    text = ANSI.sub("", shown(listings("runs/study"), 200))
    assert row(text, LONG)[:3] == [LONG, "eval-train", "done"]


def test_a_name_cannot_colour_or_move_the_terminal(here: Path) -> None:
    sweep = study(here, ["one"])
    begun(sweep, "one", "train", "failed", "[red]no[/red] \x1b[2J bell\x07")
    assert "one: train failed: [red]no[/red]  [2J bell\n" in shown(listings("runs/study"))


def test_a_sweep_is_named_by_folder_or_name_and_a_point_by_its_run_folder(sweep: Sweep) -> None:
    whole = shown(listings("runs/study"))
    assert shown(listings("study")) == whole
    assert shown(listings(None)) == whole
    assert shown(listings(str(sweep.folder.absolute()))).partition(":")[2] == whole.partition(":")[2]
    steps = [line.split()[1:3] for line in shown(listings("runs/study/done")).splitlines()[2:6]]
    assert steps == [["train", "done"], ["consolidate", "done"], ["eval-own", "done"], ["eval-train", "done"]]


def test_a_name_that_is_nothing_is_one_line(sweep: Sweep, here: Path) -> None:
    with pytest.raises(ConfigError, match="no point of this name; did you mean trains"):
        listings("runs/study/train")
    with pytest.raises(ConfigError, match="nix: no such sweep"):
        listings("nix")
    with pytest.raises(ConfigError, match="no sweep and no run"):
        listings(None, here / "elsewhere")


def test_the_evaluations_of_a_point_have_rows_of_their_own_while_they_run(here: Path) -> None:
    sweep = study(here, ["one"])
    for step in ("train", "consolidate"):
        begun(sweep, "one", step, "done")
    begun(sweep, "one", "eval-own", "failed", "eval.tasks: is empty")
    begun(sweep, "one", "eval-train", "running")
    text = shown(listings("runs/study"))
    assert text.startswith("runs/study: 1 point, 1 failed\n")
    assert [line.split()[1:3] for line in text.splitlines()[2:4]] == [["eval-own", "failed"], ["eval-train", "running"]]


def test_the_time_left_is_that_of_the_present_rate_also_after_a_pause(here: Path) -> None:
    config = begun(study(here, ["one"]), "one", "train", "running")
    logged(config, range(0, 301, 10), rate=100.0)
    time.sleep(0.01)
    logged(config, range(301, 501, 10), rate=4.0)  # resumed, on a slower node
    progress = read_progress(config)
    assert (progress.taken, progress.pairs_per_second) == (492, 4.0)
    assert progress.seconds_left == pytest.approx((STEPS - 492) * config.train.global_batch / 4.0)


def test_one_slow_entry_does_not_change_the_time_left(here: Path) -> None:
    config = begun(study(here, ["one"]), "one", "train", "running")
    logged(config, range(0, 301, 10), rate=8.0)
    logged(config, range(301, 302), rate=0.001)  # the first after a start compiles
    assert read_progress(config).seconds_left == pytest.approx(STEPS - 302)


def test_a_log_that_is_being_written_is_read_to_its_last_whole_line(here: Path) -> None:
    config = begun(study(here, ["one"]), "one", "train", "running")
    assert read_progress(config).taken == 0
    logged(config, range(0, 3000), rate=8.0)  # longer than what is read
    log = config.run_folder / "log.jsonl"
    assert log.stat().st_size > 2**16
    with log.open("a") as file:
        file.write(
            json.dumps({"step": 3000, "loss/total": float("nan")}) + '\n[1]\n{"step": "x"}\n{"step": 3001, "loss/to'
        )
    progress = read_progress(config)
    assert progress.taken == 3001
    assert "nan" in shown(listings("runs/study"))


def test_a_training_stands_still_only_after_several_of_its_own_steps(here: Path) -> None:
    config = begun(study(here, ["one"]), "one", "train", "running")
    run = config.run_folder
    logged(config, range(0, 101, 10), rate=0.4)  # 200 s between two entries
    aged(run, 720)
    assert standstill(config, read_progress(config)) == ""
    aged(run, 1200)
    assert standstill(config, read_progress(config)) == "no step for 20 min"
    os.utime(run / "stages" / "train.json")
    assert standstill(config, read_progress(config)) == "", "it has just started again"
    aged(run, 1200)
    (run / "alive").mkdir()
    (run / "alive" / "rank-0.json").write_text(json.dumps({"doing": "validating after 100 steps"}))
    assert (
        standstill(config, read_progress(config)) == "no step for 20 min; its first rank is validating after 100 steps"
    )
    for start in ("stages/train.json", "environment.json"):  # it has just been started again
        aged(run, 1200)
        (run / start).write_text("{}")
        assert standstill(config, read_progress(config)) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (99, "99 s"),
        (100, "2 min"),
        (5940, "99 min"),
        (6000, "1.7 h"),
        (172_000, "47.8 h"),
        (180_000, "2.1 d"),
    ],
)
def test_a_duration_is_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_jobs_in_the_queue_say_why_they_wait(here: Path, commands: Path) -> None:
    sweep = study(here, ["a", "b", "c", "d", "e"], "cpu")
    jobs = submitted(sweep)
    begun(sweep, "e", "train", "running", job=jobs["e"])
    begun(sweep, "e", "train", "running", job=jobs["e"])  # started for the second time
    waiting = [("a", "Priority"), ("b", "Priority"), ("c", "PartitionTimeLimit"), ("d", "SomethingNew")]
    answers(
        commands,
        "squeue",
        squeue(
            *((jobs[name], "PENDING", reason, "") for name, reason in waiting), (jobs["e"], "RUNNING", "None", "n7")
        ),
    )
    text = shown(listings("runs/study"))
    assert text.startswith("runs/study: 5 points, 4 queued, 1 running\n")
    assert row(text, "a") == ["a", "train", "queued", "0/1000", "77_0"]
    assert row(text, "e") == ["e", "train", "running", "0/1000", "1", "n7", "77_4"]
    assert "2 x train queued: waits its turn\n" in text
    assert "1 x train queued: a longer time limit than the partition gives" in text
    assert "1 x train queued: SomethingNew\n" in text


def broken_study(here: Path, log: str | None) -> Sweep:
    """A point whose job began, and is not in the queue any more."""
    sweep = study(here, ["one"], "cpu")
    job = submitted(sweep)["one"]
    begun(sweep, "one", "train", "running", job=job)
    folder = sweep.own / "jobs" / job
    folder.mkdir(parents=True)
    if log is not None:
        (folder / f"{job}_0_log.err").write_text(log)
    return sweep


def test_without_accounting_the_table_says_what_is_unknown(here: Path, commands: Path) -> None:
    broken_study(here, "train: 3/1000 steps\n")
    answers(commands, "squeue", "")
    for sacct in (None, 1):
        if sacct is not None:
            answers(commands, "sacct", "Slurm accounting storage is disabled", sacct)
        text = shown(listings("runs/study"))
        assert row(text, "one")[:3] == ["one", "train", "lost"]
        assert re.search(r"^one: train lost: .*no accounting", text, re.MULTILINE)


def test_without_accounting_the_log_may_say_it(here: Path, commands: Path) -> None:
    broken_study(here, "slurmstepd: error: Detected 1 oom_kill event in StepId=77.0. Some of the step tasks\n")
    answers(commands, "squeue", "")
    assert "one: train lost: out of memory on the node; raise mem_gb\n" in shown(listings("runs/study"))


def test_a_job_that_ended_before_it_could_say_anything_has_a_cause(here: Path, commands: Path) -> None:
    sweep = study(here, ["one"], "cpu")
    job = submitted(sweep)["one"]
    (sweep.own / "jobs" / job).mkdir(parents=True)
    (sweep.own / "jobs" / job / f"{job}_0_log.err").write_text("slurm_script: line 4: conda: command not found\n")
    answers(commands, "squeue", "")
    assert "one: train failed: environment: conda: command not found\n" in shown(listings("runs/study"))


def test_a_status_of_a_rank_that_was_taken_down_is_not_the_cause(here: Path, commands: Path) -> None:
    sweep = broken_study(here, "RuntimeError: [/x/gloo/transport/tcp/pair.cc:598] Connection closed by peer\n")
    job = "77_0"
    (sweep.own / "jobs" / job / f"{job}_1_log.err").write_text("ValueError: of rank one\n")
    begun(sweep, "one", "train", "failed", "Connection closed by peer", job=job)
    answers(commands, "squeue", "")
    assert "one: train failed: rank 1: ValueError: of rank one\n" in shown(listings("runs/study"))


def test_a_slurm_that_does_not_answer_leaves_what_the_disk_says(here: Path, commands: Path) -> None:
    sweep = study(here, ["a", "b", "c"], "cpu")
    jobs = submitted(sweep)
    logged(begun(sweep, "b", "train", "running", job=jobs["b"]), range(0, 31, 10), rate=16.0)
    begun(sweep, "c", "train", "failed", "optim.lr: -1 is not positive", job=jobs["c"])
    answers(commands, "squeue", "", 1)
    (commands / "squeue").write_text(
        "#!/bin/sh\necho 'squeue: error: Unable to contact slurm controller' >&2\nexit 1\n"
    )
    text = shown(listings("runs/study"))
    assert text.splitlines()[1].startswith("Slurm does not answer: squeue: error: Unable to contact slurm controller")
    assert row(text, "a")[:3] == ["a", "train", "unknown"]
    assert row(text, "b")[:4] == ["b", "train", "unknown", "31/1000"]
    assert row(text, "c")[:3] == ["c", "train", "failed"]
    assert "c: train failed: optim.lr: -1 is not positive\n" in text


def test_the_log_of_a_local_step_holds_earlier_failures_which_are_not_its_cause(here: Path) -> None:
    config = begun(study(here, ["one"]), "one", "train", "failed", "CUDA out of memory. Tried to allocate 2 GiB. GPU 0")
    (config.run_folder / "stages" / "train.log").write_text("mama: optim.lr: -1 is not positive\n")
    assert "one: train failed: out of memory on the GPU: Tried to allocate 2 GiB\n" in shown(listings("runs/study"))


def test_a_damaged_sweep_does_not_hide_the_others(here: Path) -> None:
    study(here, ["one"])
    (here / "runs" / "bad" / "sweep").mkdir(parents=True)
    (here / "runs" / "bad" / "sweep" / "sweep.yaml").write_text("{")
    text = shown(listings(None))
    assert re.match(r"runs/bad\n.*sweep.yaml: .*\nruns/study: 1 point, 1 missing\n", text)


def test_the_working_directory_is_a_name_too(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sweep.folder / "done")
    assert row(shown(listings(".")), "done")[:3] == ["done", "train", "done"]
    assert row(shown(listings("..")), "fresh")[:3] == ["fresh", "train", "missing"]
    monkeypatch.chdir(sweep.folder)
    assert row(shown(listings("broke")), "broke")[:3] == ["broke", "train", "failed"]
