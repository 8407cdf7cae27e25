"""The resources that a job requests, checked before anything is submitted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CLUSTERS = ("local", "slurm")


class SlurmError(ValueError):
    """A mistake in a profile, or a job that cannot be submitted; the message is one line: field, value, fix."""


@dataclass(frozen=True)
class Profile:
    """Resources of one job. None leaves a value to the cluster's default.

    Raises `SlurmError` if a value is out of range.
    """

    cluster: str = "local"  # local: this machine, in the background; slurm: a Slurm cluster
    partition: str | None = None  # Slurm partition; null: the cluster's default
    account: str | None = None  # Slurm account to charge; null: the user's default
    nodes: int = 1  # nodes of the job; 1 for local
    tasks_per_node: int = 1  # processes per node; in training one per GPU
    gpus_per_node: int = 0  # GPUs per node; 0: none
    cpus_per_task: int | None = None  # cores per process; null: the cluster's default
    mem_gb: float | None = None  # memory per node, in GB; null: the cluster's default
    timeout_min: int = 60  # time limit in minutes; a job that reaches it is requeued and resumes
    grace_s: int = 600  # seconds before the time limit at which the job is signalled to save; at most half the limit
    additional: dict[str, Any] = field(default_factory=dict)  # any other option of sbatch: value

    def __post_init__(self) -> None:
        if self.cluster not in CLUSTERS:
            raise SlurmError(f"cluster: {self.cluster!r} is not one of {', '.join(CLUSTERS)}")
        for name in ("nodes", "tasks_per_node", "timeout_min", "grace_s", "cpus_per_task", "mem_gb"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise SlurmError(f"{name}: {value} is not positive")
        if self.gpus_per_node < 0:
            raise SlurmError(f"gpus_per_node: {self.gpus_per_node} is negative; 0 requests none")
        if self.cluster == "local" and self.nodes > 1:
            raise SlurmError(f"nodes: {self.nodes}, but cluster 'local' is one machine; set nodes: 1 or cluster: slurm")

    @property
    def tasks(self) -> int:
        """The number of processes of the whole job."""
        return self.nodes * self.tasks_per_node

    def require_array(self) -> None:
        """Raise `SlurmError` if an array cannot use this profile: each of its jobs is a single task on Slurm."""
        if self.cluster != "slurm":
            raise SlurmError(
                f"cluster: {self.cluster!r} has no arrays; give a profile with cluster: slurm, or leave --jobs out"
            )
        for name in ("nodes", "tasks_per_node"):
            if getattr(self, name) != 1:
                raise SlurmError(f"{name}: {getattr(self, name)}, but each job of an array is a single task; set 1")
