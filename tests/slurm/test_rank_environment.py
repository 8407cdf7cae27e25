"""What a task makes of the variables that Slurm and submitit set."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import slurm.rank_environment
from slurm.profile import SlurmError
from slurm.rank_environment import (
    exclude_node_and_requeue,
    export_distributed_environment,
    job_state,
    requeue,
)

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "2",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A task of a step of three nodes; whom it asks for the port is noted in the port."""
    for name in RANK_VARIABLES:
        monkeypatch.setenv(name, "")  # so that what the call exports is taken back afterwards
        monkeypatch.delenv(name)
    of_a_job = ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
    for name in ("SUBMITIT_EXECUTOR", "SLURM_PTY_PORT", *of_a_job):
        monkeypatch.delenv(name, raising=False)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(slurm.rank_environment, "agreed_port", lambda *asked: "/".join(map(str, asked)))
    return monkeypatch


def exported() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in RANK_VARIABLES}


@pytest.mark.parametrize("submitted", [True, False])
def test_a_task_of_a_step_is_a_rank(task: pytest.MonkeyPatch, submitted: bool) -> None:
    if submitted:
        task.setenv("SUBMITIT_EXECUTOR", "slurm")
        task.setenv("RANK", "55")  # left over from the process that submitted the job
    assert export_distributed_environment()
    assert exported() == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "2",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "4711.3.0/5/7/gpu07",
    }
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def test_a_job_that_starts_again_asks_for_another_port(task: pytest.MonkeyPatch) -> None:
    task.setenv("SLURM_RESTART_COUNT", "2")
    assert export_distributed_environment()
    assert os.environ["MASTER_PORT"].startswith("4711.3.2/")


@pytest.mark.parametrize(
    ("per_node", "node", "expected"), [("2(x3),1", 2, "2"), ("2(x3),1", 3, "1"), ("4", 0, "4"), ("1,2,12(x2)", 3, "12")]
)
def test_nodes_may_have_uneven_tasks(task: pytest.MonkeyPatch, per_node: str, node: int, expected: str) -> None:
    task.setenv("SLURM_STEP_TASKS_PER_NODE", per_node)
    task.setenv("SLURM_NODEID", str(node))
    assert export_distributed_environment()
    assert os.environ["LOCAL_WORLD_SIZE"] == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("b,a", "b"), ("gpu[07-08,11],n2", "gpu07"), ("r[1-2]-n[003,9]", "r1-n003"), ("a.c[10]x", "a.c10x")],
)
def test_the_first_node_of_a_list(task: pytest.MonkeyPatch, nodes: str, first: str) -> None:
    task.setenv("SLURM_STEP_NODELIST", nodes)
    assert export_distributed_environment()
    assert os.environ["MASTER_ADDR"] == first


@pytest.mark.parametrize(
    "changed",
    [
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": "1", "SUBMITIT_EXECUTOR": "slurm"},
        {"RANK": "0"},  # another launcher's
        {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_NTASKS": "1"},  # submitted from within the step
    ],
)
def test_one_task_or_another_launcher_exports_nothing(task: pytest.MonkeyPatch, changed: dict[str, str]) -> None:
    task.setenv("SUBMITIT_LOCAL_JOB_ID", "77")
    for name, value in changed.items():
        task.setenv(name, value)
    assert not export_distributed_environment()
    assert "WORLD_SIZE" not in os.environ


def test_no_step_exports_nothing(task: pytest.MonkeyPatch) -> None:
    task.delenv("SLURM_STEP_NUM_TASKS")
    assert not export_distributed_environment()


JOB = (
    "JobId=4711 JobName=a b JobState={state} Reason=None Restarts={restarts} PreemptTime={preempted} ExcNodeList={out}"
)


@pytest.fixture
def scontrol(task: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """Slurm says that of the job; returns what was asked of it before."""
    task.setenv("SUBMITIT_EXECUTOR", "slurm")
    task.setenv("SUBMITIT_FOLDER", str(tmp_path / "jobs" / "%j"))
    (tmp_path / "jobs" / "4711").mkdir(parents=True)
    asked = tmp_path / "asked"
    asked.touch()

    def say(
        state: str = "RUNNING", restarts: int = 0, preempted: str = "None", out: str = "", rc: int = 0
    ) -> list[str]:
        text = JOB.format(state=state, restarts=restarts, preempted=preempted, out=out or "(null)")
        (tmp_path / "scontrol").write_text(
            f"#!/bin/sh\nif [ $1 = --oneliner ]; then echo '{text}'; exit; fi\n"
            f'echo "$@" >> {asked}\n[ {rc} = 0 ] || echo "Requested operation is presently disabled" >&2\nexit {rc}\n'
        )
        (tmp_path / "scontrol").chmod(0o755)
        return asked.read_text().splitlines()

    task.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    say()
    return say


def test_what_slurm_does_with_the_job(scontrol: Callable[..., list[str]], task: pytest.MonkeyPatch) -> None:
    assert job_state() == "running"
    scontrol(preempted="2026-11-26T22:11:18")
    assert job_state() == "preempted"
    scontrol(state="SIGNALING", preempted="2026-11-26T22:11:18")
    assert job_state() == "preempted"
    scontrol(state="COMPLETING", preempted="2026-11-26T22:11:18")
    assert job_state() == "ended"
    scontrol(state="COMPLETING", restarts=1)
    assert job_state() == "requeued"
    task.setenv("SLURM_RESTART_COUNT", "1")
    assert job_state() == "ended"
    task.setenv("SUBMITIT_EXECUTOR", "local")
    assert job_state() == "running"


def test_without_an_answer_the_job_runs(scontrol: Callable[..., list[str]], task: pytest.MonkeyPatch) -> None:
    task.setenv("PATH", "/nowhere")
    assert job_state() == "running"


def test_a_cancelled_job_is_not_put_back(scontrol: Callable[..., list[str]]) -> None:
    scontrol(state="COMPLETING")
    with pytest.raises(SlurmError, match="job 4711 was cancelled"):
        requeue()
    assert not exclude_node_and_requeue("gpu08")
    assert scontrol() == []


def test_a_refusal_to_requeue_is_one_line(scontrol: Callable[..., list[str]]) -> None:
    scontrol(rc=1)
    with pytest.raises(SlurmError, match="scontrol requeue 4711: Requested operation is presently disabled") as caught:
        requeue()
    assert "\n" not in str(caught.value)


def test_a_node_is_excluded_once(scontrol: Callable[..., list[str]]) -> None:
    scontrol(out="gpu[01-02]")
    assert exclude_node_and_requeue("gpu08")
    assert scontrol() == ["requeue 4711", "update JobId=4711 ExcNodeList=gpu[01-02],gpu08"]
    assert not exclude_node_and_requeue("gpu11")
    assert len(scontrol()) == 2


def test_a_task_of_an_array_asks_for_itself_alone(
    scontrol: Callable[..., list[str]], task: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The last one to start has the number of the whole array as its SLURM_JOB_ID."""
    task.setenv("SLURM_ARRAY_JOB_ID", "4711")
    task.setenv("SLURM_ARRAY_TASK_ID", "5")
    (tmp_path / "jobs" / "4711_5").mkdir()
    requeue()
    assert exclude_node_and_requeue("gpu08")
    assert scontrol() == ["requeue 4711_5", "requeue 4711_5", "update JobId=4711_5 ExcNodeList=gpu08"]
