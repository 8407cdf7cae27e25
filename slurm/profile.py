"""What a job asks of the cluster: a small YAML file, checked before anything is submitted."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

CLUSTERS = ("local", "slurm")


class SlurmError(ValueError):
    """A user's mistake or a failed job, told in one line: what, where, and how to mend it."""


@dataclass(frozen=True)
class Profile:
    """Resources of one job; what is `None` is left to the cluster's own default.

    Raises `SlurmError` when it is built with a value of the wrong type or out of range.
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
        _check_types(self)
        if self.cluster not in CLUSTERS:
            raise SlurmError(f"cluster: {self.cluster!r} is not one of {', '.join(CLUSTERS)}")
        for name in ("nodes", "tasks_per_node", "timeout_min", "grace_s", "cpus_per_task", "mem_gb"):
            value = getattr(self, name)
            if value is not None and value <= 0:
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


def load_profile(path: str | Path) -> Profile:
    """Read a profile from YAML; every mistake in it is a `SlurmError` that names the file and the key."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SlurmError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except yaml.YAMLError as error:
        raise SlurmError(f"{path}: is not valid YAML ({' '.join(str(error).split())})") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise SlurmError(f"{path}: holds a {type(values).__name__}; write one `key: value` a line")
    known = [f.name for f in fields(Profile)]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
            raise SlurmError(f"{path}: {key}: unknown key; {hint}")
    try:
        return Profile(**values)
    except SlurmError as error:
        raise SlurmError(f"{path}: {error}") from error


_WORDS: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "a text"),
    str | None: ((str, type(None)), "a text"),
    int: ((int,), "a whole number"),
    int | None: ((int, type(None)), "a whole number"),
    float | None: ((int, float, type(None)), "a number"),
    dict[str, Any]: ((dict,), "a mapping of sbatch options"),
}


def _check_types(profile: Profile) -> None:
    for name, hint in get_type_hints(Profile).items():
        value = getattr(profile, name)
        types, words = _WORDS[hint]
        # YAML reads `yes` and `on` as booleans, and Python takes a boolean for an int.
        if isinstance(value, bool) or not isinstance(value, types):
            raise SlurmError(f"{name}: {value!r} is not {words}")
