"""The script that sbatch is given: the profile's resources as options, then the job's Python on all of its tasks."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slurm import blocked_signals
from slurm.profile import Profile

# Variables that Slurm, submitit and launchers set in a job for this job alone.
OF_A_JOB = re.compile(r"(SLURMD?|SRUN|SUBMITIT|PMIX?|PALS|TORCHELASTIC)_|SBATCH_(CPU|MEM)_BIND")
RANK_VARIABLES = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
}
GPU_VARIABLES = {"CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "GPU_DEVICE_ORDINAL"}
# What a user, or the cluster, says of Slurm itself.
KEPT = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT"}
# Of sbatch, which would then wait until the job has ended, write its log elsewhere, or make an array of one job.
NOT_OURS = {"SBATCH_WAIT", "SBATCH_OUTPUT", "SBATCH_ERROR", "SBATCH_ARRAY_INX"}
# Options of sbatch whose variable is not named as they are.
VARIABLES = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE", "array": "ARRAY_INX", "requeue": "NO_REQUEUE"}


def sbatch_options(profile: Profile) -> dict[str, Any]:
    """Long option of sbatch -> value. True stands for an option without a value, None for one that is left out."""
    return {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": profile.exclude,
        "nodes": profile.nodes,
        "ntasks-per-node": profile.tasks_per_node,
        "gpus-per-node": profile.gpus_per_node or None,  # clusters without GPUs refuse even a 0
        "cpus-per-task": profile.cpus_per_task,
        "mem": None if profile.mem_gb is None else _memory(profile.mem_gb),
        "time": profile.timeout_min,
        # submitit's signal. To the tasks alone: the shell of the script would end by it.
        "signal": f"USR2@{notice_s(profile)}",
        "open-mode": "append",
        "requeue": True,  # where the cluster's JobRequeue=0, jobs are not put back in the queue otherwise
        **{name.lstrip("-").replace("_", "-"): value for name, value in profile.additional.items()},
    }


def notice_s(profile: Profile) -> int:
    """Seconds before its time limit at which a job is signalled."""
    return min(profile.grace_s, profile.timeout_min * 30)


def script(options: dict[str, Any], profile: Profile, folder: Path, job: str, code: Path | None) -> str:
    """The whole script. `job` is Slurm's pattern for the job's id: submitit's folder of it is `folder`/`job`.

    code: where the job imports its packages from, whatever is installed or lies in the working folder.
    """
    logs = f"{folder}/{job}/{job}"
    options = {"output": f"{logs}_0_log.out", "error": f"{logs}_0_log.err", **options}
    lines = [f"#SBATCH {option}" for option in _flags(options)]
    srun = {
        "unbuffered": True,
        "output": f"{logs}_%t_log.out",
        "error": f"{logs}_%t_log.err",
        "kill-on-bad-exit": 1,  # else the other ranks would wait for one that died
        "export": "ALL",  # of this script, also where the cluster or the user has sbatch export nothing
        "wait": 0,  # a cluster's WaitTime would end the job soon after the first task that has nothing left to do
        "cpus-per-task": options.get("cpus-per-task"),  # srun does not take it from sbatch since Slurm 22.05
        **{name.lstrip("-").replace("_", "-"): value for name, value in profile.srun.items()},
    }
    variables = ["export SUBMITIT_EXECUTOR=slurm"]
    if code is not None:
        variables.append(f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}")
    setup = ["", "# setup", *profile.setup] if profile.setup else []
    call = " ".join(["srun", *_flags(srun), *map(shlex.quote, _python(profile, folder, code))])
    return "\n".join(["#!/bin/bash", *lines, *setup, "", *variables, call, ""])


def environment_for_sbatch(environment: Mapping[str, str], options: dict[str, Any]) -> dict[str, str]:
    """The variables for sbatch, which a job inherits: those of the job and rank that this process may be are left out.

    The user's own settings of Slurm stay: where it is, and defaults (SBATCH_*) of options that the profile leaves out.
    Otherwise they would win over the script.
    """
    given = {name for name, value in options.items() if value is not None}
    left_out = {f"SBATCH_{VARIABLES.get(name, name).upper().replace('-', '_')}" for name in given}
    left_out |= RANK_VARIABLES | NOT_OURS
    if "SLURM_JOB_ID" in environment:
        left_out |= GPU_VARIABLES
    return {
        name: value
        for name, value in environment.items()
        if name in KEPT or not (name in left_out or OF_A_JOB.match(name))
    }


def _python(profile: Profile, folder: Path, code: Path | None) -> list[str]:
    """The command line of a task: submitit, started with the signals blocked that it does not handle yet."""
    python = profile.python or sys.executable
    start = blocked_signals.__file__ if code is None else str(code / "slurm" / "blocked_signals.py")
    # -I -S: start without PYTHON* variables and site packages, to block signals as early as possible.
    # -P: the working folder may be a checkout that was edited since.
    safe = [] if code is None else ["-P"]
    return [python, "-I", "-S", start, python, *safe, "-u", "-m", "submitit.core._submit", f"{folder}/%j"]


def _flags(options: dict[str, Any]) -> list[str]:
    """`--name=value` for each option, quoted for a shell."""
    given = {name: value for name, value in sorted(options.items()) if value is not None and value is not False}
    return [f"--{name}" if value is True else f"--{name}={shlex.quote(str(value))}" for name, value in given.items()]


def _memory(gb: float) -> str:
    return f"{int(gb)}GB" if gb == int(gb) else f"{int(gb * 1024)}MB"
