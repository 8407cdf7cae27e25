"""What a job asks of the cluster: checked before anything is submitted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CLUSTERS = ("local", "slurm")


class SlurmError(ValueError):
    """A user's mistake or a failed job, told in one line: what, where, and how to mend it."""


@dataclass(frozen=True)
class Profile:
    """Resources of one job; what is `None` is left to the cluster's own default.

    Raises `SlurmError` when it is built with a value out of range.
    """

    cluster: str = "local"  # local | slurm
    partition: str | None = None
    account: str | None = None
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    mem_gb: float | None = None  # per node
    timeout_min: int = 60
    grace_s: int = 600  # seconds before that limit at which Slurm tells a job to save; at most half of it
    additional: dict[str, Any] = field(default_factory=dict)  # any other option of sbatch: value

    def __post_init__(self) -> None:
        if self.cluster not in CLUSTERS:
            raise SlurmError(f"cluster: {self.cluster!r} is not one of {', '.join(CLUSTERS)}")
        for name in ("nodes", "tasks_per_node", "timeout_min", "grace_s", "cpus_per_task", "mem_gb"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise SlurmError(f"{name}: {value} is not positive")
        if self.gpus_per_node < 0:
            raise SlurmError(f"gpus_per_node: {self.gpus_per_node} is negative; 0 asks for none")
        if self.cluster == "local" and self.nodes > 1:
            raise SlurmError(f"nodes: {self.nodes}, but cluster 'local' is one machine; set nodes: 1 or cluster: slurm")

    @property
    def tasks(self) -> int:
        """Processes of the whole job."""
        return self.nodes * self.tasks_per_node

    def require_array(self) -> None:
        """Raises `SlurmError` where this is no profile for an array of jobs: each of those is a single task."""
        if self.cluster != "slurm":
            raise SlurmError(
                f"cluster: {self.cluster!r} has no arrays; give a profile with cluster: slurm, or leave --jobs out"
            )
        for name in ("nodes", "tasks_per_node"):
            if getattr(self, name) != 1:
                raise SlurmError(f"{name}: {getattr(self, name)}, but each job of an array is a single task; set 1")
