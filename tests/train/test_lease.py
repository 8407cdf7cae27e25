"""Who may write into a run folder, and when another takes over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mama.errors import ConfigError, LaterError, StoppedError, TrainingError
from mama.runtime import preemption
from mama.train import lease
from mama.train.lease import Holder, held


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, seconds in {"SILENCE": 0.6, "PATIENCE": 0.3, "IN_JOB": 0.3, "POLL": 0.01}.items():
        monkeypatch.setattr(lease, name, seconds)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    yield
    preemption._received = 0


@pytest.fixture
def other() -> Iterator[Holder]:
    """Another process of this machine that lives."""
    process = subprocess.Popen(["sleep", "60"])
    yield replace(Holder.this(), pid=process.pid, started=lease._started(process.pid) or "")
    process.kill()
    process.wait()


def write(run: Path, number: int, holder: Holder) -> Path:
    path = lease._path(run, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**asdict(holder), "over": False}))
    return path


def test_a_second_training_is_refused_while_the_first_lives(tmp_path: Path, other: Holder) -> None:
    write(tmp_path, 7, replace(other, job="4711"))
    message = rf"^name: {tmp_path} is being trained by process {other.pid} on \S+ \(Slurm job 4711\); wait for it"
    with pytest.raises(ConfigError, match=message) as caught, held(tmp_path):
        pass
    assert "\n" not in str(caught.value)
    os.kill(other.pid, signal.SIGKILL)  # as yet a zombie
    with held(tmp_path) as mine:
        assert mine.number == 8
    assert [p.name for p in (tmp_path / "alive").iterdir()] == ["lease-000008.json"]
    with held(tmp_path) as mine:
        assert mine.number == 9


def test_a_file_in_the_place_of_the_run_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match=r"^\S+/run/alive: cannot be made a folder [^\n]+$"), held(tmp_path / "run"):
        pass


def test_a_number_that_another_process_has_now_is_not_the_holder(tmp_path: Path, other: Holder) -> None:
    write(tmp_path, 1, replace(other, started="1"))
    with held(tmp_path) as mine:
        assert mine.number == 2


def test_a_holder_elsewhere_is_dead_when_its_file_stays_the_same(tmp_path: Path, other: Holder) -> None:
    """Whatever its clock says, and whatever process has its number here."""
    path = write(tmp_path, 1, replace(other, machine="another boot"))
    os.utime(path, (2**33, 2**33))
    with held(tmp_path) as mine:
        assert mine.number == 2
    path = write(tmp_path, 3, replace(other, machine="another boot"))
    with (
        lease.repeated(0.05, lambda: os.utime(path)),
        pytest.raises(ConfigError, match="is being trained by process"),
        held(tmp_path),
    ):
        pass
    path.write_text("")  # a machine lost power while it was written
    with held(tmp_path) as mine:
        assert mine.number == 4


def test_a_requeued_job_waits_for_its_own_earlier_start_and_is_not_lost(
    tmp_path: Path, other: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setattr(lease, "PATIENCE", 0.0)
    write(tmp_path, 1, replace(other, job="4711"))
    with pytest.raises(LaterError, match="an earlier start of this job, still trains"), held(tmp_path):
        pass
    preemption._received = preemption.END
    with pytest.raises(StoppedError, match="a signal ended it while it waited"), held(tmp_path):
        pass
    preemption._received = 0
    monkeypatch.setattr(lease, "IN_JOB", 60.0)
    with ThreadPoolExecutor() as pool:
        began = pool.submit(lambda: ExitStack().enter_context(held(tmp_path)))
        os.kill(other.pid, signal.SIGKILL)
        assert began.result(10).number == 2


def test_one_of_many_takes_a_dead_lease_and_a_holder_that_slept_writes_nothing(tmp_path: Path, other: Holder) -> None:
    with held(tmp_path) as asleep:
        write(tmp_path, 1, replace(other, started="1"))  # to the others it is dead
        program = (
            "import sys\nfrom pathlib import Path\nfrom mama.train import lease\n"
            "run = Path(sys.argv[1])\nlease._newest(run)\ninput()\n"
            "print(lease._create(run, 2, lease.Holder.this()) is not None)"
        )
        crowd = [
            subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdin=-1, stdout=-1, text=True)
            for _ in range(6)
        ]
        for process in crowd:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        won = [process.communicate()[0].strip() for process in crowd]
        assert sorted(won) == ["False"] * 5 + ["True"]
        with pytest.raises(TrainingError, match=r"process \d+ on \S+ has taken over"):
            asleep.check()
    assert lease._newest(tmp_path) == 2
    assert lease._create(tmp_path, 1, Holder.this()) is None, "an old number, by a process that slept"
