"""Training on two nodes of a real Slurm, which takes them away in every way that it has."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch

from mama.run import checkpoints
from mama.run.checkpoint_marker import read_marker
from mama.settings.schema import Config
from mama.train import loop, node_facts, pretraining
from slurm.profile import Profile
from slurm.submit import submit
from tests.support import jobs
from tests.support.checkout import CHECKOUT
from tests.support.checkpoint_folder import weights_of
from tests.support.cohort import write_shards
from tests.support.slurm_cluster import NODES
from tests.support.tiny_run import config_of

if TYPE_CHECKING:
    from tests.support.slurm_cluster import Cluster

pytestmark = pytest.mark.ranks

pytest_plugins = ("tests.support.slurm_cluster",)
wait_for = partial(jobs.wait_for, seconds=400)
STEPS = 26
SLOW = "slow"  # file in the run folder: while it is there, steps are so long that Slurm looks at the time limit between
SECOND = list(NODES)[1]
BOTH = Profile(cluster="slurm", partition="preempted", nodes=2)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))  # the job unpickles by this module's name
    write_shards(tmp_path / "shards", {"train": 10, "val": 4, "test": 6})
    base = config_of(tmp_path, "on-two-nodes", steps=STEPS)
    return replace(base, train=replace(base.train, validate_every=0))


def slowly(config: Config) -> Path:
    """Train as a job does, with steps that are long enough for something to happen in them."""
    step = pretraining.training_step

    def slow(*arguments: Any) -> Any:
        time.sleep(5 if (config.run_folder / SLOW).exists() else 0.4)
        return step(*arguments)

    with patch.object(pretraining, "training_step", slow):
        return loop.train(config)


def steps_logged(config: Config) -> list[int]:
    log = config.run_folder / "log.jsonl"
    return [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []


def fact(cluster: Cluster, job: str, name: str) -> str:
    """One of the facts of a job; empty if Slurm has forgotten it."""
    said = re.search(rf"\b{name}=(\S+)", cluster.call("scontrol", "--oneliner", "show", "job", job).stdout)
    return said[1] if said else ""


def near_its_time_limit(cluster: Cluster, job: str) -> None:
    """The notice, ten minutes before the limit, comes with Slurm's next look at the time, within half a minute."""
    slow = Path(fact(cluster, job, "StdErr")).parents[2] / "runs" / "on-two-nodes" / SLOW
    slow.touch()
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    wait_for(lambda: fact(cluster, job, "JobState") == "PENDING", seconds=120)
    slow.unlink()
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")


def requeued_from_a_drained_node(cluster: Cluster, job: str) -> None:
    cluster.run("scontrol", "update", f"NodeName={SECOND}", "State=DRAIN", "Reason=test")
    time.sleep(1)  # the job goes on
    cluster.run("scontrol", "requeue", job)
    cluster.run("scontrol", "update", f"NodeName={SECOND}", "State=RESUME")


def preempted(cluster: Cluster, job: str) -> None:
    """PreemptMode=CANCEL: Slurm would end it for good after the grace time, which is longer than this test waits."""
    cluster.run("sbatch", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=true")


def is_second_daemon(cluster: Cluster, process: Path) -> bool:
    """Whether a process, by its folder in /proc, is this cluster's daemon of the second node."""
    try:
        command, environment = ((process / name).read_bytes() for name in ("cmdline", "environ"))
    except OSError:  # it has ended
        return False
    return f"slurmd\0-D\0-N\0{SECOND}\0".encode() in command and f"SLURM_CONF={cluster.folder}/".encode() in environment


def without_a_daemon(cluster: Cluster, job: str) -> None:
    """The daemon of the second node dies and its tasks live on; Slurm finds the node down, and starts the job again."""
    (daemon,) = [int(process.name) for process in Path("/proc").glob("[0-9]*") if is_second_daemon(cluster, process)]
    os.kill(daemon, signal.SIGKILL)
    cluster.run("scontrol", "update", f"NodeName={SECOND}", "State=DOWN", "Reason=test")
    wait_for(lambda: fact(cluster, job, "JobState") == "PENDING")
    subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "slurmd", "-D", "-N", SECOND],
        env=cluster.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    cluster.run("scontrol", "update", f"NodeName={SECOND}", "State=RESUME")
    wait_for(lambda: not list((cluster.folder / f"spool-{SECOND}").glob(f"{SECOND}_{job}.*")))  # tasks of the old start
    # The new daemon ends them by the number of the job, and looks again after pauses that double: those of a new start
    # have that number too. Slurm's own two minutes before it are longer.
    time.sleep(10)


def ended(cluster: Cluster, job: str) -> None:
    """By a signal that nobody follows up: it saves, and keeps no node waiting; then it is submitted again."""
    cluster.run("scancel", "--signal=TERM", job)
    wait_for(lambda: not cluster.jobs())


def start_soon(cluster: Cluster, job: str) -> None:
    """A job that was requeued would wait two minutes, for the daemon of its node to forget that it was ended.

    Slurm sets that time when the last of its old tasks is gone: also after this was called.
    """
    wait_for(lambda: fact(cluster, job, "JobState") == "PENDING", seconds=60)

    def starts() -> bool:
        begin = fact(cluster, job, "StartTime")
        if fact(cluster, job, "JobState") != "PENDING":
            return True
        if begin.startswith("2") and datetime.fromisoformat(begin) > datetime.now() + timedelta(seconds=5):
            cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+2")
        return False

    wait_for(starts, seconds=60)


ENDS = (near_its_time_limit, requeued_from_a_drained_node, preempted, without_a_daemon, ended)


def test_a_run_on_two_nodes_that_ends_in_every_way_has_the_weights_of_one_that_does_not(
    slurm_cluster: Cluster, config: Config, tmp_path: Path
) -> None:
    local = replace(config, name="local")
    loop.train(local)
    job = submit(slowly, config, profile=BOTH, folder=tmp_path).job_id
    for end in ENDS:
        before = len(steps_logged(config))
        wait_for(lambda before=before: len(steps_logged(config)) > before)  # type: ignore[misc]
        end(slurm_cluster, job)
        if end is ended:
            job = submit(slowly, config, profile=BOTH, folder=tmp_path).job_id
        else:
            start_soon(slurm_cluster, job)
        if end is not without_a_daemon:  # there a rank had no time to save
            saved = read_marker(checkpoints.checkpoints(config.run_folder)[-1]).step
            assert steps_logged(config) == list(range(saved)), f"{end.__name__}: saved in the step in which it came"
        assert len(steps_logged(config)) < STEPS, f"{end.__name__}: too late to show anything"
    wait_for(lambda: not slurm_cluster.jobs())
    assert steps_logged(config) == list(range(STEPS))
    expected, found = (weights_of(run.run_folder / "checkpoints" / f"step-{STEPS:06d}") for run in (local, config))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def blind_on_second_node(config: Config) -> Path:
    """Train where the shards are not mounted on the second node."""
    if os.environ["SLURMD_NODENAME"] != SECOND:
        return loop.train(config)
    with patch.object(node_facts, "_manifest", return_value=("No such file or directory", False)):
        return loop.train(config)


def test_a_job_leaves_a_node_that_sees_no_shards(slurm_cluster: Cluster, config: Config, tmp_path: Path) -> None:
    job = submit(blind_on_second_node, config, profile=BOTH, folder=tmp_path)
    wait_for(lambda: fact(slurm_cluster, job.job_id, "ExcNodeList") == SECOND)
    wait_for(lambda: fact(slurm_cluster, job.job_id, "JobState") == "PENDING")
    said = Path(job.paths.stderr).read_text()
    assert re.search(
        rf"data\.shards \S+/shards: rank 1 on {SECOND} sees No such file or directory, rank 0 on \S+ ", said
    )
    assert f"back in the queue, without node {SECOND}" in said
    assert steps_logged(config) == []


def stuck_at_first(config: Config) -> Path:
    """Train, but the second rank of the first start does not come back from its fourth step."""
    step = pretraining.training_step

    def stuck(engine: Any, batches: Any, config: Config, number: int) -> Any:
        if number == 3 and (os.environ["RANK"], os.environ.get("SLURM_RESTART_COUNT", "0")) == ("1", "0"):
            threading.Event().wait()
        return step(engine, batches, config, number)

    with patch.object(pretraining, "training_step", stuck):
        return loop.train(config)


def test_a_job_that_hangs_goes_back_in_the_queue_and_ends(
    slurm_cluster: Cluster, config: Config, tmp_path: Path
) -> None:
    train = replace(config.train, patience=0.1, steps=5, save_every=2)
    config = replace(config, train=train, data=replace(config.data, workers=0))  # a loader would have to start first
    job = submit(stuck_at_first, config, profile=replace(BOTH, partition="cpu"), folder=tmp_path)
    wait_for(lambda: fact(slurm_cluster, job.job_id, "Restarts") == "1")
    start_soon(slurm_cluster, job.job_id)
    said = Path(job.paths.stderr).read_text()
    assert re.search(rf"train\.patience: .* the last step was 2: .*rank 1 \({SECOND}, pid \d+\) was in step 3 ", said)
    wait_for(lambda: not slurm_cluster.jobs())
    assert steps_logged(config) == list(range(5))
    assert fact(slurm_cluster, job.job_id, "JobState") == "COMPLETED"
