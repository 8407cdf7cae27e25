"""`mama jobs` on a real Slurm: jobs that wait, run, fail and are cancelled, with accounting and without."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from mama.cli.main import cli
from mama.errors import ConfigError, StoppedError
from mama.sweep.state import states
from mama.train.loop import train
from slurm.profile import Profile
from slurm.submit import submit
from tests.support.checkout import CHECKOUT
from tests.support.jobs import wait_for
from tests.support.study import begun, study

if TYPE_CHECKING:
    from tests.support.slurm_cluster import Cluster

pytestmark = pytest.mark.ranks
pytest_plugins = ("tests.support.slurm_cluster",)
CPU = Profile(cluster="slurm", partition="cpu")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    return tmp_path


def mama(*arguments: str) -> str:
    return CliRunner().invoke(cli, arguments, catch_exceptions=False).output


def words(run: str) -> list[str]:
    """The words of the only row of a run."""
    return mama("jobs", run).splitlines()[2].split()


def fail(text: str) -> None:
    raise ConfigError(text)


def stop_at_a_signal(ready: Path, *_: Any) -> None:
    """Like a training: SIGTERM makes it save, for longer than Slurm waits (KillWait), and end with `StoppedError`."""

    def stop(number: int, frame: object) -> None:
        raise StoppedError("a signal ended it after 3 of 9 steps; run it again to continue")

    signal.signal(signal.SIGTERM, stop)
    ready.touch()
    try:
        time.sleep(300)
    finally:
        time.sleep(7)


def test_the_states_of_jobs(slurm_cluster: Cluster, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = submit(fail, "optim.lr: -1 is not positive", profile=CPU, folder=here / "runs" / "wrong").job_id
    sleeps = submit(time.sleep, 300, profile=CPU, folder=here / "runs" / "sleeps").job_id
    later = Profile(cluster="slurm", partition="cpu", additional={"begin": "now+1hour"})
    waits = submit(time.sleep, 300, profile=later, folder=here / "runs" / "waits").job_id

    wait_for(lambda: words("wrong")[2] == "failed" and words("sleeps")[2] == "running")
    text = mama("jobs")
    assert "wrong: job failed: optim.lr: -1 is not positive\n" in text
    assert "1 x job queued: waits for its time to begin" in text
    node = slurm_cluster.run("squeue", "--noheader", f"--jobs={sleeps}", "--format=%N").strip()
    assert words("sleeps") == ["sleeps", "job", "running", node, sleeps]
    assert words("waits") == ["waits", "job", "queued", waits]

    assert mama("jobs", "cancel", "runs/sleeps", "runs/waits") == (
        f"runs/sleeps: job (job {sleeps}) was cancelled\nruns/waits: job (job {waits}) was cancelled\n"
    )
    wait_for(lambda: not slurm_cluster.jobs())
    for run in ("sleeps", "waits"):
        wait_for(lambda run=run: words(run)[2] == "stopped")  # type: ignore[misc]
        assert f"{run}: job stopped: cancelled\n" in mama("jobs", run)

    folder = here / "without-sacct"
    folder.mkdir()
    (folder / "squeue").symlink_to(str(shutil.which("squeue")))
    monkeypatch.setenv("PATH", str(folder))
    assert words("wrong") == ["wrong", "job", "failed", node, wrong]
    assert "sleeps: job stopped: cancelled\n" in mama("jobs", "sleeps")  # its log says so
    assert "waits: job lost: ended, cause unknown: its log does not say, and there is no accounting\n" in mama(
        "jobs", "waits"
    )


def test_a_training_that_is_cancelled_has_time_to_save(slurm_cluster: Cluster, here: Path) -> None:
    run = here / "runs" / "trains"
    job = submit(stop_at_a_signal, here / "ready", train, profile=CPU, folder=run).job_id  # its pickle names `train`
    wait_for((here / "ready").exists)
    assert mama("jobs", "cancel", str(run)) == (
        f"{run}: train (job {job}) was asked to save and stop; scancel {job} ends it at once\n"
    )
    wait_for(lambda: not slurm_cluster.jobs())
    wait_for(lambda: "trains: train stopped: a signal ended it after 3 of 9 steps; run it" in mama("jobs", "trains"))


def test_cancel_and_retry_are_for_the_named_points(closed: Cluster, here: Path) -> None:
    (here / "cpu.yaml").write_text("cluster: slurm\npartition: cpu\n")
    sweep = study(here, ["one", "two", "three"], str(here / "cpu.yaml"))
    begun(sweep, "one", "train", "failed", "out of luck", job="1_0")
    begun(sweep, "two", "train", "failed", "out of luck", job="1_1")

    assert "submitted" in mama("jobs", "retry", "runs/study/one")
    assert {name: steps[0].state for name, steps in states(sweep).items()} == {
        "one": "queued", "two": "failed", "three": "missing",
    }  # fmt: skip
    assert len(closed.jobs()) == len(sweep.steps())

    said = mama("jobs", "cancel", "runs/study/one", "runs/study/two").splitlines()
    assert len(said) == len(sweep.steps()) + 1
    assert said[-1] == "runs/study/two: nothing waits or runs"
    wait_for(lambda: not closed.jobs())
    assert "submitted" in mama("jobs", "retry", "runs/study/one", "runs/study/two")
    assert len(closed.jobs()) == 2 * len(sweep.steps())
