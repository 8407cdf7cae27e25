"""How the answers of Slurm are read that the cluster of the tests does not give."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm.profile import SlurmError
from slurm.queue import ended, limits, never_starts, queue, release

Say = Callable[[str, str], None]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Let a command of Slurm be this script."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def write(command: str, script: str) -> None:
        (tmp_path / command).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / command).chmod(0o755)

    return write


def test_the_users_own_defaults_hide_no_job(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a partition that is hidden; a job that is not in the queue would be submitted again."""
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    say(
        "squeue",
        r"""[ -z "$SQUEUE_STATES" ] || exit
case "$*" in *--all*) ;; *) exit ;; esac
printf 'CLUSTER: big\n'
printf '12_3\037PENDING\037(null)\037\037a name\037\0370\037\n13\037REVOKED\037None\037\037b\037\0370\037\n'""",
    )
    (job,) = queue()
    assert (job.id, job.state, job.reason, job.name) == ("12_3", "PENDING", "", "a name")


def test_tasks_that_never_ran_are_found_in_the_row_of_their_array(say: Say) -> None:
    row = "12_[$tasks%2]|CANCELLED by 0|None assigned|0:0"
    say("sacct", f'tasks=0-6:2,9; [ "$SLURM_BITSTR_LEN" = 0 ] || tasks=0...; echo "{row}"; echo "12_7|FAILED|n1|3:0"')
    found = ended([f"12_{task}" for task in range(10)])
    assert {job: each.state for job, each in found.items()} == {
        **dict.fromkeys(("12_0", "12_2", "12_4", "12_6", "12_9"), "CANCELLED"),
        "12_7": "FAILED",
    }


@pytest.mark.parametrize("gone_is_last", [True, False])
def test_a_job_that_has_ended_hides_no_refusal_for_another(say: Say, gone_is_last: bool) -> None:
    told = ["3_1: No error", "Invalid job id specified for job 1"]
    refused = "Access/permission denied for job 2"
    for lines in (told, [refused, *told] if gone_is_last else [*told, refused]):
        say("scontrol", "\n".join(f"echo '{line}' >&2" for line in lines) + "\nexit 1")
        if lines is told:
            release(["1", "3"])
    with pytest.raises(SlurmError, match="Access/permission denied for job 2"):
        release(["1", "2"])


def test_a_job_that_is_held_after_it_was_requeued_waits_until_it_is_released(say: Say) -> None:
    """As Slurm does after a prolog that fails; in either of its spellings."""
    rows = (r"1\037SPECIAL_EXIT\037job requeued in held state", r"2\037PENDING\037launch_failed_requeued_held")
    say("squeue", "printf '" + "".join(rf"{row}\037\037a\037\0371\037\n" for row in rows) + "'")
    first, second = queue()
    assert (first.state, second.state) == ("PENDING", "PENDING")
    for job, why in ((first, "it was put back in the queue"), (second, "its node could not start it")):
        assert str(never_starts(job.reason)).startswith(f"{why}, and ")


def test_the_smallest_limit_counts_but_not_that_of_a_closed_account(say: Say) -> None:
    say("scontrol", "echo 'MaxArraySize            = 2001'")
    assoc, qos = r"old|normal|0|\nbreast|long|500|900\n", r"normal||300|\nlong|400||\n"
    say("sacctmgr", f"case $4 in assoc) printf '{assoc}' ;; qos) printf '{qos}' ;; esac")
    assert (limits().array_size, limits().jobs) == (2001, 300)
    assert limits("breast").jobs == 400
    assert limits("breast", "normal").jobs == 300
    assert limits("old", "other").jobs is None
