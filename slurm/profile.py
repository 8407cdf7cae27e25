"""The resources that a job requests, checked before anything is submitted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CLUSTERS = ("local", "slurm")
# Options of sbatch that are given by a key of their own, as more is computed from it: how many tasks share a work, the
# notice before the time limit, what counts as a time-out, GPU-hours.
COUNTED = {"time": "timeout_min (minutes)", "ntasks-per-node": "tasks_per_node"}


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
    qos: str | None = None  # quality of service; null: the default of the account
    constraint: str | None = None  # features that the nodes must have, for example a100&ib
    exclude: str | None = None  # nodes that the job must not use, for example gpu[07-08]
    nodes: int | None = 1  # nodes of the job; 1 for local
    tasks_per_node: int | None = 1  # processes per node; in training one per GPU; null: as `additional` says
    gpus_per_node: int | None = 0  # GPUs per node; 0 or null: none, or as `additional` says
    cpus_per_task: int | None = None  # cores per process; null: the cluster's default
    mem_gb: float | None = None  # memory per node, in GB; null: the cluster's default
    timeout_min: int = 60  # time limit in minutes; a job that reaches it is requeued and resumes
    grace_s: int = 600  # seconds before the time limit at which the job is signalled to save; at most half the limit
    array_parallelism: int | None = None  # jobs of an array that run at the same time; null: as many as the cluster can
    setup: list[str] = field(default_factory=list)  # lines of shell before the job: module load, export, source
    python: str | None = None  # Python of the job, for example that of a container; null: the one that runs now
    additional: dict[str, Any] = field(default_factory=dict)  # any other option of sbatch: value
    srun: dict[str, Any] = field(default_factory=dict)  # any option of srun: value, for example container-image

    def __post_init__(self) -> None:
        if self.cluster not in CLUSTERS:
            raise SlurmError(f"cluster: {self.cluster!r} is not one of {', '.join(CLUSTERS)}")
        positive = ("nodes", "tasks_per_node", "timeout_min", "grace_s", "cpus_per_task", "mem_gb", "array_parallelism")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise SlurmError(f"{name}: {value} is not positive")
        if (self.gpus_per_node or 0) < 0:
            raise SlurmError(f"gpus_per_node: {self.gpus_per_node} is negative; 0 requests none")
        for name, value in self.additional.items():
            if key := COUNTED.get(name.lstrip("-").replace("_", "-")):
                raise SlurmError(f"additional.{name}: {value}; give {key} in its place")
        if self.cluster == "local" and (self.nodes or 1) > 1:
            raise SlurmError(f"nodes: {self.nodes}, but cluster 'local' is one machine; set nodes: 1 or cluster: slurm")

    @property
    def tasks(self) -> int:
        """The number of processes of the whole job, as far as the profile tells."""
        number = str(self.additional.get("ntasks", ""))
        return int(number) if number.isdecimal() else (self.nodes or 1) * (self.tasks_per_node or 1)

    def require_cluster(self) -> None:
        """Raise `SlurmError` if there is no array with this profile."""
        if self.cluster != "slurm":
            raise SlurmError(
                f"cluster: {self.cluster!r} has no arrays; give a profile with cluster: slurm, or leave --jobs out"
            )

    def require_one_task(self) -> None:
        """Raise `SlurmError` if a job has more than one task: each would do the whole work of one that shares none."""
        for name in ("nodes", "tasks_per_node"):
            if getattr(self, name) not in (None, 1):
                raise SlurmError(f"{name}: {getattr(self, name)}, but each job of packing is a single task; set 1")
        if self.tasks != 1:
            raise SlurmError(f"additional.ntasks: {self.tasks}, but each job of packing is a single task; set 1")
