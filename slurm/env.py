"""The ranks of a job with several tasks, told in the variables that torch.distributed reads."""

from __future__ import annotations

import os

import submitit


def export_distributed_environment() -> bool:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from the job.

    Returns whether it did: only inside a submitit job of more than one task. Every task gets the same
    address (the job's first node) and port (a function of the job's id), so no other word is needed.
    """
    if "SUBMITIT_EXECUTOR" not in os.environ or submitit.JobEnvironment().num_tasks == 1:
        return False
    # The variables of an outer job must not win. Each task keeps all GPUs of its node in sight and takes
    # the one of its local rank: with one visible GPU per task, that index would point past the end.
    submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    return True
