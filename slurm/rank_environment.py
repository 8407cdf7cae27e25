"""What a task of a job knows of itself: its rank, and what Slurm is about to do with the job."""

from __future__ import annotations

import os
import re
import shlex
import subprocess

import submitit

from slurm.profile import SlurmError
from slurm.rendezvous import agreed_port
from slurm.task import job_id


def export_distributed_environment() -> bool:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and return whether it did.

    It does in a submitit job of more than one task and, unless a launcher has set RANK, in a step of more than one
    task that `srun` started, but not for what is typed in a shell that is such a step (`srun --pty bash`). All tasks
    must call it: they agree on a free port, and wait for each other.

    Raises `SlurmError` if a task does not appear, or cannot reach the first one.
    """
    submitted = os.environ.get("SUBMITIT_EXECUTOR")
    if submitted == "local":
        variables = _in_local_job()
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and (submitted or not ("RANK" in os.environ or _typed())):
        variables = _in_step()
    else:
        variables = {}
    # Variables that an outer job left must not win. Each task keeps all GPUs of its node visible and takes that of
    # its local rank: with one visible GPU per task that index would be out of range.
    os.environ.update(variables)
    return bool(variables)


def job_state() -> str:
    """What Slurm does with this job, for a task that was signalled.

    - "preempted": its nodes are wanted. After the grace time Slurm ends it, and puts it back in the queue or not: the
      job cannot know. `requeue` puts it back at once.
    - "requeued": it is being ended and will start again by itself.
    - "ended": it is being ended for good: cancelled, or over its time limit.
    - "running": nothing; only a signal came. So too outside of a Slurm job that submitit started, and where Slurm does
      not answer.
    """
    job = _described() if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" else {}
    state = job.get("JobState", "RUNNING")
    if state in ("RUNNING", "SIGNALING", "RESIZING"):
        return "preempted" if job.get("PreemptTime", "None") not in ("None", "Unknown") else "running"
    restarted = int(job.get("Restarts", "0")) > int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return "requeued" if restarted else "ended"


def requeue() -> None:
    """Put this job, or this task of an array, back in the queue. Slurm then ends all tasks, within seconds.

    For task 0 alone, when all is saved; the others must not fail before. Raises `SlurmError` if Slurm refuses, and
    for a job that was cancelled: Slurm would start it again.
    """
    if job_state() == "ended":
        raise SlurmError(f"job {job_id()} was cancelled or is over its time limit, so it is not put back in the queue")
    _ask_slurm(f"scontrol requeue {job_id()}")


def exclude_node_and_requeue(node: str) -> bool:
    """Put this job back in the queue, for nodes other than `node` (as Slurm names it: SLURMD_NODENAME of a task there).

    For one task alone, and once per job: returns False, and does nothing, if the job has excluded a node before, or
    is none that submitit started on Slurm, or is being ended. True: Slurm ends all tasks, within seconds.

    Raises `SlurmError` if Slurm refuses.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm" or job_state() in ("ended", "requeued"):
        return False
    note = submitit.JobEnvironment().paths.folder / "excluded_node"
    if note.exists():
        return False
    before = _described().get("ExcNodeList", "(null)")
    nodes = node if before == "(null)" else f"{before},{node}"
    note.write_text(f"{node}\n")
    job = job_id()
    # Slurm lets only a job that waits exclude nodes, and one that is put back in the queue gets SIGTERM, and half a
    # minute until SIGKILL.
    _ask_slurm(f"scontrol requeue {job} && scontrol update JobId={job} ExcNodeList={shlex.quote(nodes)}")
    return True


def _in_local_job() -> dict[str, str]:
    """The variables of a task of a submitit job on this machine; none for a job of one task."""
    job = submitit.JobEnvironment()
    rank, tasks = job.global_rank, job.num_tasks
    if tasks == 1:
        return {}
    return _variables(f"local.{job.job_id}", rank, tasks, job.local_rank, tasks, "127.0.0.1")


def _in_step() -> dict[str, str]:
    """The variables of a task of a step, from those that `srun` sets (srun(1), OUTPUT ENVIRONMENT VARIABLES)."""
    rank, tasks, local_rank, node = (
        int(os.environ[name]) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID")
    )
    start = (os.environ["SLURM_JOB_ID"], os.environ["SLURM_STEP_ID"], os.environ.get("SLURM_RESTART_COUNT", "0"))
    on_nodes = _tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])
    host = _first_node(os.environ["SLURM_STEP_NODELIST"])
    return _variables(".".join(start), rank, tasks, local_rank, on_nodes[node], host)


def _variables(step: str, rank: int, tasks: int, local_rank: int, on_node: int, host: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(on_node),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(agreed_port(step, rank, tasks, host)),
    }


def _tasks_per_node(text: str) -> list[int]:
    """[2, 2, 2, 1] for Slurm's "2(x3),1"."""
    return [int(n) for n, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", text) for _ in range(int(times or 1))]


def _first_node(nodes: str) -> str:
    """gpu07 for Slurm's "gpu[07-08,11],n2". In a container there may be no scontrol to ask."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodes).partition(",")[0]


def _typed() -> bool:
    """Whether this process was typed in an interactive shell that is a step (`srun --pty bash`) of several tasks.

    Only that shell's first task has a terminal: no other rank would ever come. The variables of a pseudo-terminal are
    inherited by what srun starts from that shell, but its terminal is not; and a shell that one types in gives each
    command a process group of its own.
    """
    if "SLURM_PTY_PORT" not in os.environ or os.getpgrp() == os.getsid(0):
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _described() -> dict[str, str]:
    """What Slurm says of this job; nothing if it does not answer."""
    command = ["scontrol", "--oneliner", "show", "job", str(job_id())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(pair.partition("=")[::2] for pair in done.stdout.split())


def _ask_slurm(command: str) -> None:
    """Run a line of shell, to its end though Slurm signals this task meanwhile. Raises `SlurmError` if it fails."""
    try:
        done = subprocess.run(["sh", "-c", f'trap "" TERM; {command}'], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"Slurm does not answer: {command}") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SlurmError(f"{command}: {lines[-1]}")
