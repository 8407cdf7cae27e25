"""Set the variables that torch.distributed reads in each task of a Slurm job."""

from __future__ import annotations

import os
import subprocess

import submitit


def export_distributed_environment() -> bool:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and return whether it did.

    It does in a submitit job of more than one task and, unless a launcher has set RANK, in a step of more than one
    task that `srun` started. All tasks derive the same address (the first node) and port (from the job id), so they
    need no further communication.
    """
    if "SUBMITIT_EXECUTOR" in os.environ and submitit.JobEnvironment().num_tasks > 1:
        # overwrite: variables left by an outer job must not win. Each task keeps all GPUs of its node visible and
        # takes that of its local rank: with one visible GPU per task that index would be out of range.
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        return True
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return False
    os.environ.update(_step_environment())
    return True


def first_task() -> bool:
    """Whether this process is the first task of its job, or of its step if `srun` started it; True outside of jobs."""
    name = "SUBMITIT_LOCAL_GLOBALID" if os.environ.get("SUBMITIT_EXECUTOR") == "local" else "SLURM_PROCID"
    return os.environ.get(name, "0") == "0"


def being_preempted() -> bool:
    """Whether Slurm preempts this job: it will end it after the grace time, and perhaps requeue it.

    False for a job on the local machine, and for one that only received a signal.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return False
    command = ["scontrol", "--oneliner", "show", "job", os.environ["SLURM_JOB_ID"]]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    job = dict(pair.partition("=")[::2] for pair in output.split())
    return job.get("PreemptTime", "None") not in ("None", "Unknown")


def _step_environment() -> dict[str, str]:
    """The variables of this task, from those that `srun` sets (srun(1), OUTPUT ENVIRONMENT VARIABLES)."""
    tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
    nodes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks // len(nodes)),
        "MASTER_ADDR": nodes[0],
        "MASTER_PORT": str(20_000 + (job * 97 + step) % 20_000),
    }


def job_id() -> str | None:
    """The number of the Slurm job that this process is a task of, "123", or "123_4" in an array; None outside."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
