"""The ranks of a job with several tasks, told in the variables that torch.distributed reads."""

from __future__ import annotations

import os
import subprocess

import submitit


def export_distributed_environment() -> bool:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from the job.

    Returns whether it did: in a submitit job of more than one task, and in a step of more than one task that
    somebody's own `srun` started, unless a launcher has set RANK already. Every task gets the same address
    (the first node's) and port (a function of the job's id), so no other word is needed.
    """
    if "SUBMITIT_EXECUTOR" in os.environ and submitit.JobEnvironment().num_tasks > 1:
        # The variables of an outer job must not win. Each task keeps all GPUs of its node in sight and takes
        # the one of its local rank: with one visible GPU per task, that index would point past the end.
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        return True
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return False
    os.environ.update(_of_step())
    return True


def being_preempted() -> bool:
    """Will the cluster end this job by itself soon, and perhaps put it back in the queue?

    Where it gives no grace time it has ended it already. False for a job that this machine runs, and where
    nothing but a signal was sent.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return False
    command = ["scontrol", "--oneliner", "show", "job", os.environ["SLURM_JOB_ID"]]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    words = dict(word.partition("=")[::2] for word in said.split())
    return words.get("PreemptTime", "None") not in ("None", "Unknown")


def _of_step() -> dict[str, str]:
    """From the variables that `srun` sets in each of its tasks (its manual, OUTPUT ENVIRONMENT VARIABLES)."""
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
