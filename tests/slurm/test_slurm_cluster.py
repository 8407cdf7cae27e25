"""Pack with an array of jobs, and train with the tasks of one job, on a real Slurm; see `slurm_cluster`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from click.testing import CliRunner
from submitit.core.utils import FailedJobError, UncompletedJobError

from mama.cli.main import cli
from mama.run import checkpoints
from mama.settings.load import save
from mama.settings.schema import Config
from mama.train import checkpoint
from shards.check.check import check
from shards.errors import ShardError
from shards.pack.pack import make_plan, pack
from shards.pack.settings import PackConfig
from shards.read.manifest import load_manifest
from slurm.profile import Profile, SlurmError
from slurm.submit import submit, submit_array
from tests.support.cohort import write_shards
from tests.support.jobs import result_of, wait_for
from tests.support.slurm_cluster import LARGEST_ARRAY
from tests.support.tiny_run import config_of

if TYPE_CHECKING:
    from tests.support.slurm_cluster import Cluster

pytestmark = pytest.mark.ranks

pytest_plugins = ("tests.support.slurm_cluster",)
CPU = Profile(cluster="slurm", partition="cpu")
TWO_RANKS = Profile(cluster="slurm", partition="cpu", tasks_per_node=2)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> PackConfig:
    """A finished build that no cluster had a hand in."""
    folder = tmp_path_factory.mktemp("local")
    config = PackConfig(
        source="phantom",
        root=str(folder / "archive"),
        out=str(folder / "out"),
        options={"patients": 6},
        long_side=100,
        samples_per_shard=2,
        workers=1,
        key_file=str(folder / "hash.key"),
    )
    pack(config)
    return config


@pytest.fixture
def config(local: PackConfig, tmp_path: Path) -> PackConfig:
    """The same build, planned in another folder."""
    config = replace(local, out=str(tmp_path / "out"))
    assert make_plan(config) >= 3
    return config


def contents(config: PackConfig) -> dict[str, bytes]:
    """Every file of a build, by its path in the folder."""
    files = (path for path in Path(config.out).rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(config.out)): path.read_bytes() for path in files}


def requeue(cluster: Cluster, job_id: str) -> None:
    """Give a running job the signal that Slurm sends before it takes the node away, and let it start again.

    A requeued job waits two minutes, for the daemon of its node to forget that it was ended: a second is enough.
    """
    cluster.run("scancel", "--signal=USR2", job_id)
    state = ("squeue", "--noheader", "--array", "--format=%T", f"--jobs={job_id}")
    wait_for(lambda: cluster.run(*state) == "PENDING\n")
    cluster.run("scontrol", "update", f"JobId={job_id}", "StartTime=now+2")


def test_an_array_packs_what_a_local_build_packs_and_keeps_others_out(
    slurm_cluster: Cluster, local: PackConfig, config: PackConfig, tmp_path: Path
) -> None:
    def pack_after_go(config: PackConfig, part: int, parts: int, folder: str) -> None:
        from shards.pack import pack as module

        write = module._write

        def write_after_go(*arguments: object) -> None:
            Path(folder, f"part{part}").touch()
            while not Path(folder, "go").exists():
                time.sleep(0.05)
            write(*arguments)  # type: ignore[arg-type]

        module._write = write_after_go  # type: ignore[assignment]
        module.pack_part(config, part, parts)

    config = replace(config, workers=2)
    parts = [(config, part, 2, str(tmp_path)) for part in range(2)]
    jobs, last = submit_array(pack_after_go, parts, pack, config, profile=CPU, folder=tmp_path, name="pack")
    wait_for(lambda: (tmp_path / "part0").exists() and (tmp_path / "part1").exists())
    with pytest.raises(ShardError, match="another process is building") as caught:
        pack(config)
    assert "\n" not in str(caught.value)
    assert sorted(slurm_cluster.jobs()) == sorted(job.job_id for job in (*jobs, last))
    (tmp_path / "go").touch()

    assert result_of(last) == load_manifest(Path(config.out))
    assert [job.exception() for job in jobs] == [None, None]
    assert contents(config) == contents(local)
    assert check(Path(config.out)) == []
    logs = [tmp_path / "jobs" / job.job_id / f"{job.job_id}_0_log.err" for job in (*jobs, last)]
    assert all(log.is_file() for log in logs)


def test_the_job_after_the_array_completes_what_a_dead_one_left(
    slurm_cluster: Cluster, local: PackConfig, config: PackConfig, tmp_path: Path
) -> None:
    def pack_or_die(config: PackConfig, part: int, parts: int) -> None:
        from shards.pack import pack as module

        if part == 0:
            os.kill(os.getpid(), 9)
        if part == 1:
            raise MemoryError("invented")
        module.pack_part(config, part, parts)

    parts = [(config, part, 3) for part in range(3)]
    jobs, last = submit_array(pack_or_die, parts, pack, config, profile=CPU, folder=tmp_path)
    result_of(last)
    assert contents(config) == contents(local)
    with pytest.raises(FailedJobError, match="MemoryError: invented"):
        result_of(jobs[1])
    with pytest.raises(UncompletedJobError, match=jobs[0].job_id):
        result_of(jobs[0])


def test_a_preempted_job_of_an_array_is_requeued_and_the_last_one_waits_for_it(
    slurm_cluster: Cluster, local: PackConfig, config: PackConfig, tmp_path: Path
) -> None:
    def pack_at_second_start(config: PackConfig, part: int, parts: int, folder: str) -> int:
        from shards.pack import pack as module

        starts = Path(folder, f"starts{part}")
        with starts.open("a") as stream:
            stream.write("*")
        if part == 0 and starts.stat().st_size == 1:
            time.sleep(60)
        module.pack_part(config, part, parts)
        return starts.stat().st_size

    def pack_and_count(config: PackConfig, folder: str) -> int:
        starts = Path(folder, "starts0").stat().st_size
        pack(config)
        return starts

    parts = [(config, part, 2, str(tmp_path)) for part in range(2)]
    jobs, last = submit_array(
        pack_at_second_start, parts, pack_and_count, config, str(tmp_path), profile=CPU, folder=tmp_path
    )
    wait_for(lambda: (tmp_path / "starts0").exists())
    assert result_of(jobs[1]) == 1
    requeue(slurm_cluster, jobs[0].job_id)
    assert result_of(last) == 2
    assert result_of(jobs[0]) == 2
    assert contents(config) == contents(local)


def test_mama_pack_with_jobs_is_such_an_array(
    slurm_cluster: Cluster, local: PackConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cpu.yaml").write_text("cluster: slurm\npartition: cpu\n")
    pack_section = {**asdict(local), "out": "out"}
    (tmp_path / "archive.yaml").write_text(yaml.safe_dump({"name": "archive", "pack": pack_section}))
    arguments = ("pack", "archive.yaml", "--slurm", "--jobs", "2", "--profile", "cpu.yaml")
    output = CliRunner().invoke(cli, arguments, catch_exceptions=False).output
    assert "array " in output
    wait_for(lambda: not slurm_cluster.jobs())
    assert contents(replace(local, out="out")) == contents(local)


def test_one_job_is_an_array_too(slurm_cluster: Cluster, tmp_path: Path) -> None:
    jobs, last = submit_array(max, [(1, 2)], min, 1, 2, profile=CPU, folder=tmp_path)
    assert [result_of(job) for job in (*jobs, last)] == [2, 1]


def test_the_array_is_cancelled_if_its_last_job_is_refused(
    slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(
        "#!/bin/sh\n"
        "if grep -q dependency $1; then echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1; fi\n"
        f"PATH={slurm_cluster.environment['PATH']} sbatch --begin=now+1hour $1 | tee {tmp_path}/reply\n"
    )
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    with pytest.raises(SlurmError, match=r"cannot be submitted: .*QOSMaxSubmitJobPerUserLimit") as caught:
        submit_array(max, [(1, 2), (3, 4)], min, 1, 2, profile=CPU, folder=tmp_path)
    assert "\n" not in str(caught.value)
    wait_for(lambda: not slurm_cluster.jobs())
    number = (tmp_path / "reply").read_text().split()[-1]
    assert slurm_cluster.run("scontrol", "show", "job", number).count("JobState=CANCELLED") >= 1


def test_an_array_too_large_for_the_cluster_is_one_line(slurm_cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(SlurmError, match=r"cannot be submitted: .*Invalid job array specification") as caught:
        submit_array(max, [(1, 2)] * (LARGEST_ARRAY + 1), min, 1, 2, profile=CPU, folder=tmp_path)
    assert "\n" not in str(caught.value)
    assert slurm_cluster.jobs() == []


@pytest.fixture
def training(tmp_path: Path) -> Config:
    """A small run; train.ranks is 1, but its ranks are the tasks of a job."""
    write_shards(tmp_path / "shards", {"train": 10, "val": 4, "test": 6})
    config = config_of(tmp_path, "on-slurm", steps=12)
    return replace(config, train=replace(config.train, ranks=1))


def steps_logged(config: Config) -> list[int]:
    log = config.run_folder / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [line["step"] for line in lines if "loss/total" in line]


class Import:
    """Takes as long as a job's imports, before it unpickles its function and submitit installs its handlers."""

    def __reduce__(self) -> tuple[object, tuple[float]]:
        return time.sleep, (8.0,)


def test_a_job_that_is_preempted_while_it_imports_goes_back_in_the_queue(
    slurm_cluster: Cluster, tmp_path: Path
) -> None:
    delays = (1.0, 2.0, 3.0)  # seconds; all may start at once: together they are less than the import takes
    jobs = [submit(print, Import(), profile=CPU, folder=tmp_path).job_id for _ in delays]

    def state(job_id: str) -> str:
        return slurm_cluster.run("squeue", "--noheader", "--format=%T", f"--jobs={job_id}").strip()

    for job_id, delay in zip(jobs, delays, strict=True):
        wait_for(lambda job_id=job_id: state(job_id) == "RUNNING")  # type: ignore[misc]
        wait_for(lambda job_id=job_id: list((tmp_path / "jobs" / job_id).glob("*_log.err")))  # type: ignore[misc]
        time.sleep(delay)
        slurm_cluster.run("scancel", "--signal=USR2", job_id)
    for job_id in jobs:
        wait_for(lambda job_id=job_id: state(job_id) == "PENDING")  # type: ignore[misc]


def test_srun_starts_the_ranks(slurm_cluster: Cluster, training: Config, tmp_path: Path) -> None:
    training = replace(training, train=replace(training.train, steps=2))
    save(training, tmp_path / "run.yaml")
    command = ["srun", "--ntasks=2", "--nodes=1", "--kill-on-bad-exit=1"]
    mama = [sys.executable, "-m", "mama", "train", str(tmp_path / "run.yaml")]
    done = subprocess.run([*command, *mama], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("DeepSpeed settings") == 1, "one rank logs"
    assert steps_logged(training) == [0, 1]
    marker = json.loads((checkpoints.checkpoints(training.run_folder)[-1] / checkpoint.MARKER).read_text())
    assert marker["ranks"] == 2
