"""Jobs run by submitit's real local executor; of Slurm only its commands and variables are faked."""

from __future__ import annotations

import os
import re
import shlex
import signal
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import submitit
from submitit.core.core import Job
from submitit.core.job_environment import SignalHandler
from submitit.core.utils import FailedJobError, UncompletedJobError
from submitit.slurm.slurm import SlurmJobEnvironment

from mama.errors import ConfigError
from mama.settings.load import load_profile
from slurm.profile import Profile, SlurmError
from slurm.submit import Request, submit, submit_array, submit_calls
from tests.support.checkout import CHECKOUT
from tests.support.jobs import result_of

CONFIGS = CHECKOUT / "configs" / "slurm"


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit waits 15 s for the result of a dead job, for slow shared file systems."""
    monkeypatch.setattr(Job, "_results_timeout_s", 0)


def test_the_result_comes_back_and_the_log_lies_in_the_folder(tmp_path: Path) -> None:
    def product(a: int, b: int) -> tuple[int, int]:
        print("multiplying")
        return a * b, os.getpid()

    job = submit(product, 6, 7, profile=Profile(), folder=tmp_path, name="product")
    value, pid = result_of(job)
    assert value == 42
    assert pid != os.getpid()
    assert "multiplying" in (tmp_path / "jobs" / job.job_id / f"{job.job_id}_0_log.out").read_text()


def test_a_failure_comes_back_and_is_in_the_log(tmp_path: Path) -> None:
    def fail() -> None:
        try:
            raise KeyError("the cause of the cause")
        except KeyError as error:
            raise ValueError("density: 'E' is not one of A, B, C, D\nand a second line of it") from error

    job = submit(fail, profile=Profile(), folder=tmp_path)
    with pytest.raises(FailedJobError, match="ValueError: density: 'E' is not one of A, B, C, D"):
        result_of(job)
    assert job.paths.stderr.is_relative_to(tmp_path)
    assert "density" in job.paths.stderr.read_text()


def test_the_task_that_raised_is_named_and_not_the_one_that_died_with_it(tmp_path: Path) -> None:
    def second_fails() -> None:
        if os.environ["SUBMITIT_LOCAL_GLOBALID"] == "1":
            raise ValueError("only the second")
        os._exit(9)

    with pytest.raises(FailedJobError, match=r"(?s)ValueError: only the second.*_1_log\.err"):
        result_of(submit(second_fails, profile=Profile(tasks_per_node=2), folder=tmp_path))


def test_a_job_that_died_continues_when_it_is_submitted_again(tmp_path: Path) -> None:
    def count(path: str, last: int, die_at: int) -> list[int]:
        """Append the numbers up to `last`, from where the file ends; the first run dies on the way."""
        file = Path(path)
        done = [int(line) for line in file.read_text().split()] if file.exists() else []
        fresh = not done
        for number in range(len(done), last):
            with file.open("a") as stream:
                stream.write(f"{number}\n")
            if fresh and number == die_at:
                print("struck", flush=True)
                os._exit(1)
        return [int(line) for line in file.read_text().split()]

    arguments = (str(tmp_path / "numbers"), 6, 2)
    with pytest.raises(UncompletedJobError, match="has not produced any output"):
        result_of(submit(count, *arguments, profile=Profile(), folder=tmp_path))
    assert result_of(submit(count, *arguments, profile=Profile(), folder=tmp_path)) == list(range(6))


def test_a_preempted_job_is_requeued_and_continues_by_itself(tmp_path: Path) -> None:
    def wait_for_second_start(path: str) -> int:
        starts = Path(path)
        with starts.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        if len(starts.read_text().split()) == 1:
            time.sleep(60)
            return -1
        return len(starts.read_text().split())

    starts = tmp_path / "starts"
    job = submit(wait_for_second_start, str(starts), profile=Profile(), folder=tmp_path)
    deadline = time.monotonic() + 30
    while not (starts.exists() and starts.read_text().endswith("\n")):
        assert time.monotonic() < deadline, job.stderr()
        time.sleep(0.05)
    os.kill(int(starts.read_text()), signal.SIGUSR2)  # what Slurm sends before it takes the node away
    assert result_of(job) == 2


def test_the_tasks_of_a_job_find_each_other(tmp_path: Path) -> None:
    def sum_of_ranks() -> tuple[float, str]:
        import torch
        import torch.distributed as dist

        from slurm.rank_environment import export_distributed_environment

        assert export_distributed_environment()
        dist.init_process_group("gloo")
        value = torch.tensor(10.0 + dist.get_rank())
        dist.all_reduce(value)
        dist.destroy_process_group()
        return value.item(), os.environ["LOCAL_RANK"]

    job = submit(sum_of_ranks, profile=Profile(tasks_per_node=2), folder=tmp_path)
    assert result_of(job) == (21.0, "0")
    assert job.results() == [(21.0, "0"), (21.0, "1")]


def _fake_slurm(folder: Path, sbatch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, script in {"srun": "exit 1", "sbatch": sbatch}.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_a_profile_reaches_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_slurm(tmp_path, f"cp $1 {tmp_path}/script; echo Submitted batch job 12", monkeypatch)
    profile = Profile(
        cluster="slurm", partition="gpu", account="breast", nodes=2, tasks_per_node=4, gpus_per_node=4,
        cpus_per_task=6, mem_gb=120, timeout_min=90, additional={"qos": "long"},
    )  # fmt: skip
    job = submit(print, "hello", profile=profile, folder=tmp_path, name="train")
    assert (job.job_id, job.num_tasks) == ("12", 8)
    script = (tmp_path / "script").read_text()
    flags = dict(
        line[10:].split("=", 1) for line in script.splitlines() if line.startswith("#SBATCH --") and "=" in line
    )
    expected = {
        "partition": "gpu", "account": "breast", "nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "4",
        "cpus-per-task": "6", "mem": "120GB", "time": "90", "qos": "long", "job-name": "train",
    }  # fmt: skip
    assert {key: flags.get(key) for key in expected} == expected
    (srun,) = re.findall(r"^srun .*", script, re.MULTILINE)
    assert " --kill-on-bad-exit=1 " in srun, "a dead rank must not leave others waiting"
    assert " --wait=0 " in srun, (
        "a task with nothing left to do must not end the others, whatever the cluster's WaitTime"
    )
    # What is put back in the queue on preemption is the job itself, to be called again.
    submission = job.submission()
    again: Any = submission._checkpoint_function()
    assert (again.function.function, again.function.args) == (print, ("hello",))
    assert flags["signal"] == "USR2@600", "time for a step, a validation and a checkpoint"
    assert submission._timeout_countdown >= 100, "a long run reaches its time limit many times"


def test_without_gpus_none_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_slurm(tmp_path, f"cp $1 {tmp_path}/script; echo Submitted batch job 12", monkeypatch)
    submit(print, profile=Profile(cluster="slurm"), folder=tmp_path)
    assert "--gpus" not in (tmp_path / "script").read_text()


def test_an_array_and_the_job_after_it_reach_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_slurm(tmp_path, f"cat $1 >> {tmp_path}/script; echo Submitted batch job 12", monkeypatch)
    profile = Profile(cluster="slurm", partition="cpu", cpus_per_task=6)
    jobs, last = submit_array(
        print, [("a", 1), ("b", 2)], print, "end", "of it", profile=profile, folder=tmp_path, name="pack"
    )
    assert ([job.job_id for job in jobs], last.job_id) == (["12_0", "12_1"], "12")
    array, after = (tmp_path / "script").read_text().split("#!/bin/bash")[1:]
    for script in (array, after):
        assert "--partition=cpu\n" in script
        assert "--cpus-per-task=6\n" in script
        assert "--gpus" not in script
    assert "--array=0-1\n" in array
    assert "--job-name=pack\n" in array
    assert "--dependency" not in array
    assert "--dependency=afterany:12\n" in after
    assert "--job-name=pack-end\n" in after
    assert "--array" not in after
    # Each of them is put back in the queue on preemption, to be called again with its own arguments.
    again: list[Any] = [job.submission()._checkpoint_function() for job in (*jobs, last)]
    assert [(a.function.function, a.function.args) for a in again] == [
        (print, ("a", 1)),
        (print, ("b", 2)),
        (print, ("end", "of it")),
    ]


def directives(script: str) -> list[str]:
    """The options of sbatch in a script, as sbatch is given them."""
    return [shlex.split(line.removeprefix("#SBATCH "))[0] for line in script.splitlines() if line.startswith("#SBATCH")]


def call_of_srun(script: str) -> list[str]:
    return shlex.split(next(line for line in script.splitlines() if line.startswith("srun ")))


def test_everything_that_a_cluster_may_want_stands_in_the_script(tmp_path: Path) -> None:
    file = tmp_path / "profile.yaml"
    file.write_text("""\
cluster: slurm
qos: 010
constraint: "a100&ib"
exclude: gpu[07-08]
nodes: null
tasks_per_node: null
gpus_per_node: null
array_parallelism: 3
setup:
  - module load cuda/12.4
  - export NCCL_SOCKET_IFNAME="ib0"
python: /opt/conda/bin/python
additional: {ntasks: 6, gpus-per-task: 1, exclusive: true, mem_per_cpu: 4G, time-min: 1-12:00:00, open-mode: null}
srun: {container-image: "nvcr.io#nvidia/pytorch:24.05-py3", container-mounts: "/data:/data:ro,/scratch", mpi: none}
""")
    profile = load_profile(file)
    assert profile.tasks == 6
    script = Request(profile=profile, folder=tmp_path, name="two words", comment="it's 5 %").script(5)
    given = directives(script)
    expected = ["qos=010", "constraint=a100&ib", "exclude=gpu[07-08]", "array=0-4%3", "job-name=two words"]
    expected += ["comment=it's 5 %", "ntasks=6", "gpus-per-task=1", "exclusive", "mem-per-cpu=4G"]
    for option in (*expected, "time-min=1-12:00:00", "requeue"):
        assert f"--{option}" in given
    names = [option.partition("=")[0] for option in given]
    left_out = {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--open-mode", "--dependency", "--hold"}
    assert left_out & set(names) == set()
    assert len(set(names)) == len(names)
    lines = script.splitlines()
    assert lines.index("module load cuda/12.4") + 1 == lines.index('export NCCL_SOCKET_IFNAME="ib0"')
    assert script.index("export NCCL_SOCKET_IFNAME") < script.index("\nsrun ")
    srun = call_of_srun(script)
    for option in (
        *("container-image=nvcr.io#nvidia/pytorch:24.05-py3", "container-mounts=/data:/data:ro,/scratch", "mpi=none"),
        "kill-on-bad-exit=1",
    ):
        assert f"--{option}" in srun
    assert srun.count("/opt/conda/bin/python") == 2
    assert sys.executable not in script
    assert not (tmp_path / "jobs").exists(), "nothing is written"


def test_a_held_array_that_waits_for_another_and_runs_a_copy_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_slurm(tmp_path, f"cp $1 {tmp_path}/script; echo Submitted batch job 12 on cluster big", monkeypatch)
    profile = Profile(cluster="slurm", nodes=2, tasks_per_node=4, cpus_per_task=3)
    how = {"dependency": "aftercorr:11", "at_once": 2, "hold": True, "comment": "a batch"}
    code = tmp_path / "code of it"
    calls = [(print, (number,)) for number in range(3)]
    jobs = submit_calls(calls, Request(profile=profile, folder=tmp_path, code=code, **how))  # type: ignore[arg-type]
    assert [(job.job_id, job.num_tasks) for job in jobs] == [("12_0", 8), ("12_1", 8), ("12_2", 8)]
    assert [job.submission().function.args for job in jobs] == [(0,), (1,), (2,)]  # type: ignore[attr-defined]
    script = (tmp_path / "script").read_text()
    assert script == Request(profile=profile, folder=tmp_path, code=code, **how).script(len(calls))  # type: ignore[arg-type]
    for option in ("array=0-2%2", "dependency=aftercorr:11", "kill-on-invalid-dep=yes", "hold", "comment=a batch"):
        assert f"--{option}" in directives(script)
    srun = call_of_srun(script)
    assert "--cpus-per-task=3" in srun, "srun does not take it from sbatch"
    assert str(code / "slurm" / "blocked_signals.py") in srun
    assert "-P" in srun, "the working folder may be a checkout"
    assert f"export PYTHONPATH='{code}'${{PYTHONPATH:+:$PYTHONPATH}}" in script
    monkeypatch.chdir(tmp_path)  # a task may start in another folder: in a container, or after a `cd` in setup
    assert script == Request(profile=profile, folder="", code=Path("code of it"), **how).script(len(calls))  # type: ignore[arg-type]
    left = [path.name for path in (tmp_path / "jobs").iterdir()]
    assert sorted(left) == ["12_0", "12_1", "12_2"]


def test_sbatch_does_not_inherit_the_job_that_it_is_called_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_slurm(tmp_path, f"env > {tmp_path}/environment; echo Submitted batch job 12", monkeypatch)
    inherited = {
        *("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_CPU_BIND", "SLURMD_NODENAME", "SRUN_DEBUG", "PMI_RANK"),
        *("SUBMITIT_EXECUTOR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
        *("CUDA_VISIBLE_DEVICES", "SBATCH_MEM_BIND_TYPE"),
    }
    overridden = {"SBATCH_PARTITION", "SBATCH_TIMELIMIT", "SBATCH_NO_REQUEUE", "SBATCH_JOB_NAME", "SBATCH_MEM_PER_NODE"}
    overridden |= {"SBATCH_WAIT", "SBATCH_OUTPUT", "SBATCH_ARRAY_INX"}  # whatever the profile says
    kept = {"SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS", "SBATCH_ACCOUNT", "SBATCH_RESERVATION", "NCCL_SOCKET_IFNAME"}
    for name in inherited | overridden | kept:
        monkeypatch.setenv(name, "1")
    submit(print, profile=Profile(cluster="slurm", partition="gpu", mem_gb=3), folder=tmp_path)
    names = {line.partition("=")[0] for line in (tmp_path / "environment").read_text().splitlines()}
    assert (inherited | overridden) & names == set()
    assert kept - names == set()
    for name in ("SLURM_JOB_ID", "RANK"):
        assert os.environ[name] == "1", "this process keeps its own"
    monkeypatch.delenv("SLURM_JOB_ID")
    submit(print, profile=Profile(cluster="slurm"), folder=tmp_path)
    assert "CUDA_VISIBLE_DEVICES=1" in (tmp_path / "environment").read_text(), "outside of a job it is the user's"


@pytest.mark.parametrize("minutes", [1, 5, 12, 60, 1440])
def test_only_a_job_that_ran_up_to_its_signal_has_timed_out(
    minutes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit counts time-outs, and ends a job after 100 of them; a preemption is none, however short the limit."""
    _fake_slurm(tmp_path, "echo Submitted batch job 12", monkeypatch)
    profile = Profile(cluster="slurm", timeout_min=minutes)
    job = submit(print, profile=profile, folder=tmp_path)
    handler = SignalHandler(SlurmJobEnvironment(), job.paths, job.submission())
    before_signal = 60 * minutes - min(600, 30 * minutes)  # seconds
    for part, timed_out in ((0.02, False), (0.85, False), (0.95, True)):
        handler._start_time = time.time() - part * before_signal
        assert handler.has_timed_out() is timed_out


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (Profile(), "cluster: 'local' has no arrays; give a profile with cluster: slurm, or leave --jobs out"),
        (Profile(cluster="slurm", tasks_per_node=4), "tasks_per_node: 4, but each job of packing is a single task"),
        (Profile(cluster="slurm", nodes=2), "nodes: 2, but each job of packing is a single task"),
        (
            Profile(cluster="slurm", tasks_per_node=None, additional={"ntasks": 2}),
            "ntasks: 2, but each job of packing",
        ),
    ],
)
def test_a_profile_that_suits_no_array_is_one_line(tmp_path: Path, profile: Profile, message: str) -> None:
    with pytest.raises(SlurmError, match=message) as caught:
        submit_array(print, [(1,), (2,)], print, profile=profile, folder=tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_by_sbatch_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_slurm(tmp_path, "echo 'sbatch: error: invalid partition specified: gpus' >&2; exit 1", monkeypatch)
    with pytest.raises(SlurmError) as caught:
        submit(print, profile=Profile(cluster="slurm", partition="gpus"), folder=tmp_path)
    assert "invalid partition specified: gpus" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_cluster_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="no sbatch command"):
        submit(print, profile=Profile(cluster="slurm"), folder=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "unknown key partitoin; did you mean partition"),
        ("flavour: gpu", "unknown key flavour"),
        ("nodes: two", "nodes: 'two' is not a whole number"),
        ("nodes: yes", "nodes: 'yes' is not a whole number"),
        ("mem_gb: 64GB", "mem_gb: '64GB' is not a number"),
        ("timeout_min: null", "timeout_min: null is not a whole number"),
        ("setup: module load cuda", "setup: .* is not a list"),
        ("array_parallelism: 0", "array_parallelism: 0 is not positive"),
        ("additional: [qos]", r"additional: \['qos'\] is not a mapping"),
        ("additional: {time: 12:30:00}", r"additional\.time: 12:30:00; give timeout_min \(minutes\) in its place"),
        ("additional: {--ntasks_per_node: 4}", "additional.--ntasks_per_node: 4; give tasks_per_node in its place"),
        ("mem_gb: .inf", "mem_gb: inf is not positive"),
        ("cluster: pbs", "cluster: 'pbs' is not one of local, slurm"),
        ("tasks_per_node: 0", "tasks_per_node: 0 is not positive"),
        ("gpus_per_node: -1", "gpus_per_node: -1 is negative"),
        ("nodes: 2", "cluster 'local' is one machine"),
        ("- nodes", "holds a list"),
        ("nodes: [1", "not YAML: "),
    ],
)
def test_a_mistake_in_a_profile_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "profile.yaml"
    file.write_text(text)
    with pytest.raises((ConfigError, SlurmError), match=message) as caught:
        load_profile(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_profile_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such profile, nor a shipped one \(cluster, cpu, local\)$"):
        load_profile(tmp_path / "none.yaml")


def test_an_empty_profile_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(ConfigError, match=r"empty\.yaml: holds no setting"):
        load_profile(tmp_path / "empty.yaml")


def test_options_of_sbatch_stay_as_they_are_typed(tmp_path: Path) -> None:
    """YAML 1.1 reads a limit of 12:30 as 750 minutes, and the partition 007 as 7."""
    (tmp_path / "typed.yaml").write_text(
        "partition: 007\naccount: yes\nadditional: {time-min: 12:30:00, begin: 010, exclusive: true, nice: 5}\n"
    )
    profile = load_profile(tmp_path / "typed.yaml")
    assert (profile.partition, profile.account) == ("007", "yes")
    assert profile.additional == {"time-min": "12:30:00", "begin": "010", "exclusive": True, "nice": 5}


def test_the_shipped_profiles_load() -> None:
    local = load_profile(CONFIGS / "local.yaml")
    assert local == load_profile("local") == load_profile("slurm/local.yaml")
    assert local.cluster == "local"
    cluster = load_profile(CONFIGS / "cluster.yaml")
    assert (cluster.cluster, cluster.tasks) == ("slurm", 4)
    cpu = load_profile(CONFIGS / "cpu.yaml")
    assert (cpu.cluster, cpu.tasks, cpu.gpus_per_node) == ("slurm", 1, 0)


def test_the_profile_on_the_page_about_clusters_and_each_line_that_a_shipped_one_proposes_load(tmp_path: Path) -> None:
    (page,) = re.findall(r"```yml\n(.*?)```", (CHECKOUT / "docs" / "cluster.md").read_text(), re.DOTALL)
    (tmp_path / "page.yaml").write_text(page)
    profile = load_profile(tmp_path / "page.yaml")
    assert (profile.tasks, profile.srun["container-image"]) == (8, "nvcr.io#nvidia/pytorch:24.05-py3")
    for name in ("cluster", "cpu"):
        proposed = re.sub(r"^# (?=\w+: )", "", (CONFIGS / f"{name}.yaml").read_text(), flags=re.MULTILINE)
        (tmp_path / f"{name}.yaml").write_text(proposed)
        assert load_profile(tmp_path / f"{name}.yaml").account == "my_group"


def test_submitit_still_calls_what_a_resumable_provides() -> None:
    """submitit looks for `checkpoint` by name: without it, a job that reaches its limit is lost."""
    from slurm.submit import Resumable

    assert hasattr(Resumable(print), "checkpoint")
    assert isinstance(Resumable(print).checkpoint(), submitit.helpers.DelayedSubmission)
